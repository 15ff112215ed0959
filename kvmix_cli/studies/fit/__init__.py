"""Memory that a model needs for a context: weights, activations and cache, in our formats and in those of others."""
