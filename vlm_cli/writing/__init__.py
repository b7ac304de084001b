"""Write prompts and conversations as tokens, with the chat template of a model or without."""
