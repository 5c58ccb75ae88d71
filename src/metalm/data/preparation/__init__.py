"""From raw text and images to WebDataset shards: in parallel, restartable, the same on any machine."""
