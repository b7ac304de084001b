"""Fusions: how vision tokens reach the language model."""
