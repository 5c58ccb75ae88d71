"""How documents of one source become rows."""
