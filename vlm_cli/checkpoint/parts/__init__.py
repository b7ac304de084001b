"""Pretrained parts: where their weights are, and how they are loaded."""
