"""`vlm export --format hf`: a model as one of Transformers' own classes, for each class that can hold it."""
