"""Model code that is copied into every exported folder. Knows torch and transformers only."""
