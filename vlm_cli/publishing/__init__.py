"""Send a model to the Hugging Face hub: its files, its card, and what the repository may already hold."""
