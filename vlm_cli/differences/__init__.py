"""What differs between two models, and between a model and what it began with."""
