"""Formats of other engines: what they store of a token, and the files in which they state it. No torch."""
