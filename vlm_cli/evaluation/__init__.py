"""Ask a model questions with known answers, and count how many it answers right."""
