"""Task files: read, rendered to documents, scored."""
