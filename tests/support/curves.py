"""Profiles with made-up curves, hypothesis strategies for them, and what a plan loses by a naive reading of a curve."""

import math
from functools import cache
from itertools import product

import numpy as np
from hypothesis import strategies as st
from made_up import CALIBRATION, make_info
from scipy.optimize import isotonic_regression

from kvmix_cli.plan import CacheSettings, LayerPlan, TensorPlan
from kvmix_cli.plan.sizes import mean_bits
from kvmix_cli.profile import LayerScore, Profile, Score, TensorScore, choice_key, parse_choice

BITS = (1, 2, 3, 4, 8)
GROUPS = (32, 64, 128)


def curve(importance, bits=BITS, groups=GROUPS, noise=lambda: 1.0):
    """A falling curve: an eighth of the error for each bit, more of it in larger groups."""
    return {choice_key(b, g): importance * math.log2(g) / 4**b * noise() for b, g in product(bits, groups)}


def make_score(k, v, unit="nats", **options):
    """A score with these curves, one for each layer; `mean` is the first value of each."""

    def tensor(values):
        return TensorScore(mean=next(iter(values.values())), curve=values)

    layers = {layer: LayerScore(k=tensor(a), v=tensor(b)) for layer, a, b in zip(range(len(k)), k, v, strict=True)}
    return Score(seconds=2.0, unit=unit, calibration=CALIBRATION, layers=layers, **options)


def curved(layers=8, *, name="loss", unit="nats", scale=0.1, seed=0, head_dim=128, groups=GROUPS, **options):
    """A profile whose importance varies by a factor of thousands, with noise on every point of every curve."""
    draw = np.random.default_rng(seed)

    def tensor():
        return curve(scale * math.exp(draw.normal(0, 2)), groups=groups, noise=lambda: math.exp(draw.normal(0, 0.2)))

    k, v = ([tensor() for _ in range(layers)] for _ in "kv")
    info = make_info(layers, head_dim=head_dim)
    return Profile(model=info, scores={name: make_score(k, v, unit, **options)})


@st.composite
def small(draw, max_layers=3, bits=(2, 3, 4), groups=(32, 64)):
    """A profile small enough to try every plan; its curves need not fall, and may be below zero."""
    layers = draw(st.integers(1, max_layers))
    values = st.integers(-20, 100).map(lambda number: number / 1000)

    def tensor():
        return {choice_key(b, g): draw(values) for b, g in product(bits, groups)}

    score = make_score([tensor() for _ in range(layers)], [tensor() for _ in range(layers)])
    return Profile(model=make_info(layers, head_dim=64), scores={"loss": score})


def naive_loss(profile, layers, settings=CacheSettings(), name="loss"):  # noqa: B008
    """The sum of the curves at a plan's choices, each made to fall at its group size by scipy and cut off at 0."""
    total = 0.0
    for layer, plan in layers.items():
        for kind, tensor in (("k", plan.k), ("v", plan.v)):
            values = getattr(profile.scores[name].layers[layer], kind).curve
            if tensor.bits != 16:
                total += _fitted(tuple(values.items()), tensor.group_size or settings.group_size)[tensor.bits]
    return total


def surprising(profile, seed=0):
    """A loss that the curves do not foresee: neighbouring layers make each other's errors worse."""

    def measure(layers):
        lost = 0.0
        for index, layer in layers.items():
            below = layers.get(index - 1, layer)
            lost += math.sin(seed + 7 * index) ** 2 * 4.0**-layer.k.bits * 4.0**-below.v.bits
        return naive_loss(profile, layers) + 30 * lost

    return measure


@cache
def _fitted(values, group):
    points = {bits: value for key, value in values for bits, size in [parse_choice(key)] if size == group}
    widths = sorted(points)
    fitted = isotonic_regression([points[bits] for bits in widths], increasing=False).x
    return dict(zip(widths, (max(0.0, value) for value in fitted), strict=True))


def all_plans(profile, k_bits, v_bits, groups, settings=CacheSettings(), pins=None):  # noqa: B008
    """Every decision for all layers that are not pinned, with the pins."""
    tensors = [
        [TensorPlan(bits=b, group_size=None if g == settings.group_size else g) for b, g in product(ladder, groups)]
        for ladder in (k_bits, v_bits)
    ]
    options = [LayerPlan(k=k, v=v) for k, v in product(*tensors)]
    free = [layer for layer in profile.model.quantizable if layer not in (pins or {})]
    for chosen in product(options, repeat=len(free)):
        yield dict(sorted({**dict(zip(free, chosen, strict=True)), **(pins or {})}.items()))


def stored(profile, layers, settings=CacheSettings()):  # noqa: B008
    """Mean stored bits."""
    return mean_bits(layers, settings, profile.model, "stored")
