"""Checkpoints in other formats, opened as sources: pickles and GGUF."""
