"""What `vlm export` writes for other programs."""
