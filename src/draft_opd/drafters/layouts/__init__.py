"""How drafters lie on disk: a file for each layout that tools and engines read."""
