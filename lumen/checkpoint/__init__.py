"""Weights on disk: Hugging Face directories, GGUF files and the native format."""
