"""Feeding a model tokens through a cache in pieces."""

import torch
from architectures import VOCABULARY

PIECES = {
    "decode": [90] + [1] * 17,
    "chunks": [70, 70, 33, 1, 1, 5, 1],
    "one token first": [1] * 17 + [88, 1],
}


def ids(count, batch=2, seed=0):
    return torch.randint(2, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


def swap_by_beams(cache):
    """Swap two sequences as a beam search may: each is repeated, one of each is kept, and these change places."""
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    cache.reorder_cache(torch.tensor([1, 0]))


@torch.no_grad()
def teacher_forced(model, cache, tokens, steps, mask=None):
    """Logits of every step when `tokens` enter the cache in pieces of the given lengths."""
    logits, start = [], 0
    for step in steps:
        stop = start + step
        options = {"attention_mask": mask[:, :stop]} if mask is not None else {}
        logits.append(model(tokens[:, start:stop], past_key_values=cache, **options).logits)
        start = stop
    return torch.cat(logits, dim=1)
