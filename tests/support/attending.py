"""Every way to attend that this machine has, and what the results must be compared with."""

import functools
from dataclasses import replace
from itertools import product

import torch
from kvmix_kernels.attend import cpu, naive
from kvmix_kernels.pooled import PooledTokens
from kvmix_kernels.runtime.native import library, use_instruction_set
from kvmix_kernels.runtime.native.processor import available, wanted
from kvmix_kernels.sorted_tokens import EVICTED, Tiers, count
from poisoned import tiers

GPU_RMS = 5e-3
"""Of kernels for GPUs, relative: coefficients are rounded to bfloat16, and so may be the result."""
GPU_LOGARITHM = 1e-2
"""Of their logarithms, absolute: what weights that are that wrong add up to."""


def instruction_sets():
    """Those that this machine has, at most the one that `KVMIX_ISA` asks for, each in use while it is given."""
    for name in available()[: available().index(wanted()) + 1]:
        if use_instruction_set(name) == name:  # none has a library under KVMIX_NATIVE=0
            yield name
    use_instruction_set()


def paths():
    """Every way to attend that this machine has, by name."""
    yield "naive", naive.attend
    for name in instruction_sets():
        yield name, functools.partial(cpu.attend, library())


def in_tiers(keys, values, gone=0, log_weight=0.0):
    """Tiers of keys and of values, in an order of tokens that each KV head has to itself; `gone` tokens are evicted.

    Tokens of the last tier count for `exp(log_weight)` tokens each.
    """
    batch, heads = (keys[0] if isinstance(keys[0], torch.Tensor) else keys[0].read(0, 0, torch.float32)).shape[:2]
    tier = tiers([count(held) for held in keys], gone, batch, heads)
    return Tiers(tier, tuple(keys), log_weight), Tiers(tier, tuple(values), log_weight)


def dense(tensor):
    """All tokens in one float64 tensor, zeros where they are gone."""
    if isinstance(tensor.packed, PooledTokens):
        return torch.cat(
            [each.double() for each in (tensor.sink, spread(tensor.packed), tensor.tail) if each is not None], 2
        )
    if isinstance(tensor.packed, Tiers):
        tier, held = tensor.packed.tier, tensor.packed.held
        nothing = tensor.tail.new_zeros(*tensor.shape[:2], tensor.packed.tokens - tensor.packed.kept, tensor.shape[3])
        tensor = replace(tensor, packed=Tiers(tier.masked_fill(tier == EVICTED, len(held)), (*held, nothing)))
    return tensor.read(0, tensor.shape[2], torch.float64)


def spread(pooled):
    """Tokens of one row, each at its KV head's place, `[B, H_kv, T, D]` float64; zeros where they are gone."""
    row = pooled.held[0]
    row = row if isinstance(row, torch.Tensor) else row.read(0, row.tokens, torch.float64)
    whole = torch.zeros(*pooled.tier.shape, row.shape[3], dtype=torch.float64)
    for batch, head in product(*map(range, pooled.tier.shape[:2])):
        own = (pooled.heads[batch, 0] == head).repeat_interleave(pooled.page)
        whole[batch, head, pooled.tier[batch, head] == 0] = row[batch, 0, own].double()
    return whole


def seen(query, key, mask):
    """Which tokens may be seen, `[B, H, S, T]`, by the mask (additive: by what it adds) and by not being gone."""
    tokens, queries = key.shape[2], query.shape[2]
    if mask is None:
        mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    if not isinstance(key.packed, Tiers | PooledTokens):
        return mask
    first, last = key.edges
    gone = torch.zeros(key.shape[:3], dtype=torch.bool)
    gone[:, :, first:last] = key.packed.tier == EVICTED
    gone = gone.repeat_interleave(query.shape[1] // key.shape[1], dim=1)[:, :, None]
    if isinstance(key.packed, Tiers) and key.packed.log_weight:
        is_last = torch.zeros(key.shape[:3], dtype=torch.bool)
        is_last[:, :, first:last] = key.packed.tier == len(key.packed.held) - 1
        more = key.packed.log_weight * is_last.repeat_interleave(query.shape[1] // key.shape[1], dim=1)[:, :, None]
        mask = (
            torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) + more if mask.dtype == torch.bool else mask + more
        )
    if mask.dtype == torch.bool:
        return mask & ~gone
    return mask.expand(*query.shape[:3], tokens).masked_fill(gone, -torch.inf)


def relative_rms(got, expected):
    return ((got.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()).item()


def like_the_definition(problem, got, logarithms):
    """Compare output and logarithms of a kernel for GPUs with the definition in float64."""
    expected, meant = naive.attend(replace(problem, query=problem.query.double()))
    assert relative_rms(got, expected) < GPU_RMS
    some = meant > -1e30  # a query that may see nothing has a logarithm near the end of float32
    torch.testing.assert_close(logarithms.double()[some], meant[some], rtol=0, atol=GPU_LOGARITHM)


def same_bits(one, other):
    """Whether two tensors of 16-bit numbers are the same, NaN included."""
    return one.shape == other.shape and torch.equal(one.view(torch.int16), other.view(torch.int16))
