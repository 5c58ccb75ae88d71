"""Who holds what: the ranks that were started, their groups, and what crosses between them."""
