"""Plans of transform codes with made-up bases, and what a cache of such a plan must amount to."""

from pathlib import Path

import numpy as np
import torch
from kvmix_kernels.transform_layout import STEPS
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvmix_cli.models.geometry import model_info
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TensorPlan, TransformSettings, TransformTensor
from kvmix_cli.plan.tensors.basis import BasisFile, LayerBasis
from kvmix_cli.plan.tensors.moments import Rope
from kvmix_cli.plan.windows import Recent

PAGE, SINK, FRAME = 16, 4, 64


def made_up_directions(kv_heads, dim, seed):
    """Directions that are neither orthogonal nor of one size, and means and deviations of keys in small models."""
    draw = np.random.default_rng(seed)
    encode = np.stack([np.linalg.qr(draw.normal(size=(dim, dim)))[0] for _ in range(kv_heads)])
    encode = encode * np.exp(draw.normal(size=(kv_heads, dim, 1)) / 2)
    deviation = np.sort(np.exp(draw.normal(size=(kv_heads, dim))), axis=1)[:, ::-1]
    arrays = (encode, np.linalg.inv(encode), 0.1 * draw.normal(size=(kv_heads, dim)), deviation)
    return LayerBasis(*(np.ascontiguousarray(array, np.float32) for array in arrays))


def made_up_basis(info, frame=FRAME, rope=None, seed=0):
    """A basis for every layer of a model; `rope` has the frequencies of its keys."""
    layers = {
        index: {
            "k": made_up_directions(info.heads(index).kv_heads, info.heads(index).key_dim, seed + 2 * index),
            "v": made_up_directions(info.heads(index).kv_heads, info.heads(index).value_dim, seed + 2 * index + 1),
        }
        for index in info.quantizable
    }
    turns = {} if rope is None else {index: Rope(np.asarray(rope, np.float64), "half", 0) for index in info.quantizable}
    return BasisFile(info.id, layers, frame, turns)


def settings_with(folder, basis, exact=0, window=10):
    """Save a basis, and return cache settings that name it."""
    path = folder / "basis.safetensors"
    transform = TransformSettings(basis=str(path), sha256=basis.save(path), frame=basis.frame, exact=exact)
    return CacheSettings(page=PAGE, sink=SINK, group_size=16, window=Recent(tokens=window), transform=transform)


def falling_widths(kv_heads, dim, seed=0):
    """Widths of every head of its own, among them 0 and 6."""
    draw = np.random.default_rng(seed)
    runs = -(-dim // 8)
    heads = [sorted(draw.integers(0, 7, size=runs), reverse=True) for _ in range(kv_heads)]
    return tuple("".join(map(str, widths)) for widths in heads)


def coded_plan(model, folder, k="coded", v="coded", exact=0, rope=None, window=10, frame=FRAME):
    """A plan of `coded` tensors, or of a number of bits."""
    info = model_info(model.config, "test")
    cache = settings_with(folder, made_up_basis(info, frame, rope), exact, window)

    def tensor(what, dim, kv_heads, seed):
        if what == "coded":
            return TransformTensor(widths=falling_widths(kv_heads, dim, seed))
        return TensorPlan(bits=what)

    layers = {}
    for index in info.quantizable:
        heads = info.heads(index)
        layers[index] = LayerPlan(
            k=tensor(k, heads.key_dim, heads.kv_heads, 2 * index),
            v=tensor(v, heads.value_dim, heads.kv_heads, 2 * index + 1),
        )
    return Plan.build(info, layers, cache)


def turned(states, positions, frequencies):
    """Keys `[..., D]` turned by RoPE on by a number of positions: complex products, pairs `(i, i + n)`."""
    n = len(frequencies)
    pairs = torch.complex(states[..., :n].double(), states[..., n : 2 * n].double())
    pairs = pairs * torch.polar(torch.ones(n, dtype=torch.float64), positions * torch.as_tensor(frequencies))
    return torch.cat([pairs.real, pairs.imag, states[..., 2 * n :].double()], dim=-1)


def coded_and_back(state, directions, head, digits, is_value):
    """One token `[D]` of one head, coded and decoded in float64."""
    encode, decode = (torch.from_numpy(array[head]).double() for array in (directions.encode, directions.decode))
    mean, deviation = (torch.from_numpy(array[head]).double() for array in (directions.mean, directions.deviation))
    widths = [int(digits[d // 8]) for d in range(len(state))]
    some = [d for d, width in enumerate(widths) if width]
    if not some:
        return mean
    units = (encode @ (state.double() - mean) / deviation)[some]
    step = torch.tensor([STEPS[widths[d]] for d in some], dtype=torch.float64)
    levels = torch.tensor([2.0 ** widths[d] for d in some], dtype=torch.float64)
    scale = torch.ones((), dtype=torch.float64)
    if is_value:
        scale = units.square().mean().sqrt().clamp(min=1e-4).half().double()
    codes = (units / scale / step + levels / 2).floor().clamp(min=0).minimum(levels - 1)
    coded = (codes - levels / 2 + 0.5) * step
    if is_value:
        scale = (scale * (coded * units / scale).sum() / coded.square().sum().clamp(min=1e-6)).half().double()
    return mean + decode[:, some] @ (coded * scale * deviation[some])


class CodedReferenceLayer(DynamicLayer):
    """A stock layer whose old tokens have been coded and decoded, one by one; none of them is exact."""

    def __init__(self, plan, settings, basis, index):
        super().__init__()
        self.plan, self.settings, self.basis, self.index = plan, settings, basis, index
        self.done = {"k": 0, "v": 0}

    def update(self, key_states, value_states, *args, **kwargs):
        if self.is_initialized:
            self.keys = self._age("k", self.keys)
            self.values = self._age("v", self.values)
        return super().update(key_states, value_states, *args, **kwargs)

    def _age(self, kind, states):
        tensor = getattr(self.plan, kind)
        if isinstance(tensor, TensorPlan):
            assert tensor.bits == 16
            return states
        tail = states.shape[2] - SINK - self.done[kind]
        pages = max(0, tail - self.settings.window.tokens) // PAGE
        states = states.clone()
        for at in range(SINK + self.done[kind], SINK + self.done[kind] + pages * PAGE):
            states[:, :, at] = self._coded(kind, states[:, :, at], at - SINK)
        self.done[kind] += pages * PAGE
        return states

    def _coded(self, kind, token, place):
        rope, frame = self.basis.rope.get(self.index), self.basis.frame
        start = 0 if rope is None or kind == "v" else place // frame * frame
        frequencies = [] if rope is None else rope.frequencies
        directions, widths = self.basis.layers[self.index][kind], getattr(self.plan, kind).widths
        found = torch.empty_like(token)
        for row in range(token.shape[0]):
            for head, digits in enumerate(widths):
                state = turned(token[row, head], -start, frequencies) if start else token[row, head]
                back = coded_and_back(state, directions, head, digits, kind == "v")
                found[row, head] = turned(back, start, frequencies) if start else back
        return found


def coded_reference(plan, config):
    """The stock cache with a reference layer for each planned one."""
    basis = BasisFile.load(Path(plan.cache.transform.basis), plan.cache.transform.sha256)
    cache = DynamicCache(config=config)
    for index, layer in plan.layers.items():
        cache.layers[index] = CodedReferenceLayer(layer, plan.cache, basis, index)
    return cache
