"""Which tokens stay, in which tier, or exact: choices of one layer as tokens leave its window."""
