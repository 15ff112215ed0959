"""Feeding a model tokens through a cache in pieces."""

import torch
from architectures import VOCABULARY

from kvmix_cli.cache.mixed import unquantized_cache

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


def left_padded(tokens, padding):
    """The mask of tokens `[B, T]` of which the first row begins with padding."""
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    return mask


def changes_nothing(model, cache, tokens, steps, padding=0, tolerance=1e-5):
    """Compare the logits through a cache with those of the unquantized one; the first row begins with padding.

    The relative tolerance is ten times the absolute one.
    """
    mask, unquantized = left_padded(tokens, padding), unquantized_cache(model.config)
    got, expected = (teacher_forced(model, each, tokens, steps, mask) for each in (cache, unquantized))
    for row, start in enumerate((padding, 0)):
        torch.testing.assert_close(got[row, start:], expected[row, start:], rtol=10 * tolerance, atol=tolerance)


@torch.no_grad()
def takes_back_without_a_trace(model, rolled_back, straight, prompt, steps):
    """Feed a prompt and steps of `(tokens, tokens that are taken back)`, and only what stays to the other cache."""
    for cache in (rolled_back, straight):
        model(ids(prompt), past_key_values=cache)
    for seed, (count, back) in enumerate(steps):
        back, new = min(back, count), ids(count, seed=seed)
        model(new, past_key_values=rolled_back)
        rolled_back.crop(-back)
        if count > back:
            model(new[:, : count - back], past_key_values=straight)
    logits = [model(ids(1, seed=99), past_key_values=cache).logits for cache in (rolled_back, straight)]
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def follows_beams(model, one, other, tokens):
    """Swap sequences `[2, T]` in one cache as a beam search may, and compare it with another that has read them so."""
    model(tokens, past_key_values=one)
    swap_by_beams(one)
    model(ids(9, seed=7), past_key_values=one)
    one.crop(-9)
    model(tokens.flip(0), past_key_values=other)
    torch.testing.assert_close(*(model(ids(2), past_key_values=cache).logits for cache in (one, other)))
