"""GGUF files: their header, their blocks, and which rows of a model they are."""
