"""How samples become documents of parts."""
