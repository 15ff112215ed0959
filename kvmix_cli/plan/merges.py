"""What each rule keeps that merges tokens, by name, for the count of bytes; the rules are in `cache/merging`."""

from __future__ import annotations

OF_SEQUENCE = 1
"""Numbers that every rule keeps of each sequence: its padding."""
_OF_HEAD: dict[str, int] = {"d2o": 1, "look-m": 0, "kvmerger": 0, "cam": 0}
"""Numbers that a rule keeps of each KV head of a sequence."""


def kept_numbers(rule: str | None, kv_heads: int) -> int:
    """Return the numbers, of four bytes, that a rule keeps of one sequence in a layer of `kv_heads` KV heads."""
    return 0 if rule is None else OF_SEQUENCE + _OF_HEAD.get(rule, 0) * kv_heads


def declare(rule: str, of_head: int) -> None:
    """Make known what a user's own rule keeps of each KV head."""
    _OF_HEAD.setdefault(rule, of_head)
