"""Scores of tokens and of key channels by importance, by name."""

from . import attended, keys, places, queries, samples  # noqa: F401 - they register their scores
from .channels import CHANNEL_SCORES, ChannelScore, ChannelStatistics
from .presses import token_score
from .tokens import TOKEN_SCORES, Candidates, TokenScore

__all__ = [
    "CHANNEL_SCORES",
    "TOKEN_SCORES",
    "Candidates",
    "ChannelScore",
    "ChannelStatistics",
    "TokenScore",
    "token_score",
]
