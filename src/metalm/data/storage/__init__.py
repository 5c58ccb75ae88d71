"""Where samples lie: tar files, their index, and the reading of members; no meaning."""
