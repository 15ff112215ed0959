"""Attention of queries over sink | packed pages | tail."""

from .naive import attend

__all__ = ["attend"]
