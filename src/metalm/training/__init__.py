"""Engines, step, loop: everything that knows DeepSpeed."""
