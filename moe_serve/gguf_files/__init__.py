"""GGUF files as checkpoints: their metadata as the files of a Hugging Face folder, and where their tensors lie."""
