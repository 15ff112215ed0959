"""`kvmix eval --leaderboard`: every score and solver, and controls, at equal stored bits."""

from .contest import hold

__all__ = ["hold"]
