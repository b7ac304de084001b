"""Export a VLM to the two GGUF files that llama.cpp reads: the language model, and the vision side (`mmproj`)."""
