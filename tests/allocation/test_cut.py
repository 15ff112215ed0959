"""A cut for keys and one for values: first layers first, chosen by the curves or keys first."""

import pytest
from curves import curved, naive_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import falling

from kvmix_cli.allocation import Budget, allocate
from kvmix_cli.plan import LayerPlan, TensorPlan


def cut(profile, asked, **options):
    return allocate(profile, asked, method="cut", **options)


def prefixes(layers, ladder):
    """All ways to have the first layers at one width of the ladder and the rest one lower."""
    return sorted(
        {
            (ladder[level + 1],) * count + (ladder[level],) * (layers - count)
            for level in range(len(ladder) - 1)
            for count in range(layers + 1)
        }
    )


def layers(k, v):
    pairs = enumerate(zip(k, v, strict=True))
    return {layer: LayerPlan(k=TensorPlan(bits=a), v=TensorPlan(bits=b)) for layer, (a, b) in pairs}


def is_prefix(widths, ladder):
    return tuple(widths) in prefixes(len(widths), ladder)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.floats(2.5, 8.5))
def test_the_best_pair_of_cuts_within_the_budget(seed, asked):
    profile = curved(4, seed=seed)
    plan = cut(profile, Budget(stored_bits=asked), k_bits=(2, 3, 8), v_bits=(2, 8))
    losses = [
        naive_loss(profile, layers(k, v))
        for k in prefixes(4, (2, 3, 8))
        for v in prefixes(4, (2, 8))
        if (sum(k) + sum(v)) / 8 + 0.5 <= asked + 1e-9
    ]
    assert plan.bits.stored <= asked + 1e-9
    assert naive_loss(profile, plan.layers) == pytest.approx(min(losses), rel=1e-9)
    assert is_prefix([layer.k.bits for layer in plan.layers.values()], (2, 3, 8))
    assert is_prefix([layer.v.bits for layer in plan.layers.values()], (2, 8))


@pytest.mark.parametrize(
    ("asked", "short"), [(2, "0-3:k2v2"), (2.25, "0:k4v2,1-3:k2v2"), (3.25, "0:k4v4,1-3:k4v2"), (4, "0-3:k4v4")]
)
def test_without_curves_keys_come_first(asked, short):
    assert cut(falling(4), Budget(avg_bits=asked), k_bits=(2, 4), v_bits=(2, 4)).short == short
