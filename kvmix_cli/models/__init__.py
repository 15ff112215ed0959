"""Models: how they are loaded, how their caches are shaped, where their projections are, what memory they take."""
