"""What a model saw while it answered a prompt: attention through all its parts, and occlusion."""
