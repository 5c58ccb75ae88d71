"""Encoders with connectors, and the causal decoder that docks them."""
