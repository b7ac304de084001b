"""Published checkpoints: recognise a layout, and copy its tensors into a VLM."""
