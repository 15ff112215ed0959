"""Scores of tokens and of key channels by importance, by name."""

from .channels import CHANNEL_SCORES, ChannelScore, ChannelStatistics
from .tokens import TOKEN_SCORES, Candidates, TokenScore

__all__ = ["CHANNEL_SCORES", "TOKEN_SCORES", "Candidates", "ChannelScore", "ChannelStatistics", "TokenScore"]
