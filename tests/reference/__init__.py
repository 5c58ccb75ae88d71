"""MetaLM written once more, plainly, from the paper's facts alone: what the system is measured against."""
