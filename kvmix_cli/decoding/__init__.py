"""Prefill and decode loops: every pass of tokens through a model and its cache."""
