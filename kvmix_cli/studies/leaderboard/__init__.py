"""`kvmix eval --leaderboard`: every score and solver, and controls, measured at equal stored bits."""

from .board import Board, hold

__all__ = ["Board", "hold"]
