"""What works with what: every vision encoder and every language model, checked."""
