"""What a model knows, by documents: held-out losses and generation."""
