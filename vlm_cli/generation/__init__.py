"""Answers of a model: to one prompt, to a file of prompts, or in a conversation."""
