"""Prompts and what a model writes after them: one, or a file of them."""
