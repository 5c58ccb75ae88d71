"""Leaving and entering Hugging Face format: checkpoints to folders that prove themselves, and back."""
