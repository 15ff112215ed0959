"""The cache of a whole model, made from a plan, and the count of what attention reads from a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..errors import CacheError, PlanError, PolicyError
from ..models.geometry import stock_layers
from ..plan import CacheSettings, LayerPlan, Plan
from ..plan.sizes import exact_tokens
from ..plan.tensor_files import check_bases
from ..plan.token_scores import PRESS
from .coded import CodedLayer
from .composed import ComposedLayer, is_composed
from .grouped import GroupedLayer
from .handle import Handle
from .layer import MixedLayer
from .policies import token_score
from .rotary import Rotations, rotations_of
from .saving import CacheFile, save_cache
from .sizes import cache_nbytes, stock_nbytes
from .stateful import StatefulLayer, layer_beside
from .tokens.shares import LayerShares


@dataclass
class Attended:
    """Numbers of (query, cached token) pairs that attention has read: of all tokens, and of packed ones.

    Keys and values count half each. Layers with a stock cache count as not quantized.
    """

    total: float = 0
    quantized: float = 0

    @property
    def share(self) -> float:
        """Return the quantized share of all pairs; 0 before there are any."""
        return self.quantized / self.total if self.total else 0.0

    def add(self, new: Tensor, read: Tensor, quantized: float | None, evicted: float = 0) -> None:
        """Count what the queries of `new` keys `[B, H_kv, S, D]` read: all of `read`, without what follows each query.

        Args:
            quantized: tokens that they read in quantized form, None for all of them.
            evicted: tokens of `read` that are gone.
        """
        batch, _, queries, _ = new.shape
        seen = read.shape[2] - evicted - (queries - 1) / 2
        self.total += batch * queries * seen
        self.quantized += batch * queries * (seen if quantized is None else quantized)

    def reset(self) -> None:
        """Start again from 0."""
        self.total = self.quantized = 0


@dataclass(frozen=True)
class HeldPrompt:
    """A layer that holds its prompt, or the group of its KV heads (None for all) that one layer stores."""

    index: int
    heads: tuple[int, ...] | None
    layer: ComposedLayer


class CountingCache(Cache):
    """A transformers cache that counts what attention reads, and can be iterated as a `DynamicCache` is.

    Attributes:
        attended: the pairs read since the cache was made or reset.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attended = Attended()

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        for layer in self.layers:
            yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)

    def __getitem__(self, layer_idx: int) -> tuple[Tensor | None, Tensor | None]:
        return self.layers[layer_idx].keys, self.layers[layer_idx].values

    def reset(self) -> None:
        """Forget all tokens, and what was counted."""
        super().reset()
        self.attended.reset()


class MixedCache(CountingCache):
    """A transformers cache that stores each layer's keys and values at the bits of a plan.

    Pass it as `past_key_values` to an unpatched model:

        cache = MixedCache.from_plan(plan, model.config)
        model.generate(**inputs, past_key_values=cache)

    Layers without full attention (sliding window, linear, shared) keep the stock layer of their kind. Where a layer
    has more than keys and values to keep (sparse indexing, hybrid layers), the rest stays as it is.

    Attributes:
        plan: the plan it was made from.
    """

    def __init__(self, layers: list[Any], plan: Plan) -> None:
        super().__init__(layers=layers)
        self.plan = plan

    @classmethod
    def from_plan(
        cls, plan: Plan, config: PreTrainedConfig | PreTrainedModel, reserve: int | None = None
    ) -> MixedCache:
        """Return an empty cache.

        Args:
            plan: bits of every layer, and settings of the cache.
            config: of the model that will use it, or the model.
            reserve: tokens it will hold in all, if known: storage is then allocated once.

        Raises:
            PlanError: if the plan does not fit the model's layers, its basis file cannot be used, or its score of
                tokens is unknown.
            PolicyError: if the score reads keys before RoPE, and the model's rotary positions are not known.
        """
        config = config.config if isinstance(config, PreTrainedModel) else config
        stock, layers = stock_layers(config), unquantized_cache(config).layers
        if len(layers) != plan.model.layers:
            raise PlanError(f"the plan has {plan.model.layers} layers and the model {len(layers)}")
        if wrong := sorted(set(plan.layers) & set(stock)):
            kinds = ", ".join(f"{layer} ({stock[layer]})" for layer in wrong)
            raise PlanError(f"the plan quantizes layers that have no full attention: {kinds}; leave them out")
        check_bases(plan)
        ropes, shares = _rotations(plan, config), LayerShares.of_plan(plan)
        for index, layer in plan.layers.items():
            parts = []
            for heads, part in layer.parts(plan.model.heads(index).kv_heads):
                own = part.settings(plan.cache)
                made = layer_beside(layers[index], _kind(part, own), index, part, own, reserve or 0)
                if isinstance(made, ComposedLayer):
                    made.rope = None if ropes is None else ropes[index]
                    made.shares = None if own.tokens is None else shares
                parts.append((heads, made))
            if len(parts) > 1:
                _check_groups(index, layers[index], plan)
            layers[index] = parts[0][1] if len(parts) == 1 else GroupedLayer(index, layer, plan.cache, parts)
        return cls(layers, plan)

    @classmethod
    def load(
        cls,
        path: Path | str | CacheFile,
        plan: Plan,
        model: PreTrainedModel,
        ids: Tensor | Sequence[Sequence[int]] | None = None,
        reserve: int | None = None,
    ) -> MixedCache:
        """Return the cache that was saved in a file, bit for bit; on a CPU it is a memory map of the file.

        Nothing is read before it is used, and nothing copied before it grows. On a GPU everything is copied there.

        Args:
            path: of the file, which must stay as it is while the cache is used; or the file, if it has been opened.
            plan: that the cache was made from.
            model: that filled it.
            ids: a prompt `[B, T]` that is going to be read: the cache then holds the first tokens of the prompt only,
                as many as are in the file, and at most all but the last. What is packed is never cut: of a page that
                holds other tokens, too, none is kept.
            reserve: as in `from_plan`.

        Raises:
            CacheError: if the file is missing, damaged, of another plan or model, or of no use for the prompt.
        """
        file = path if isinstance(path, CacheFile) else CacheFile.open(Path(path))
        cache = cls.from_plan(plan, model.config, reserve)
        file.fill(cache.layers, plan, model)
        if ids is not None:
            cache.crop(file.kept(cache.layers, torch.as_tensor(ids)) - file.header.tokens)
        return cache

    def save(self, path: Path | str, ids: Tensor | Sequence[Sequence[int]], model: PreTrainedModel) -> Path:
        """Write everything that the cache holds to a safetensors file, whole or not at all, and return its path.

        A file that is there is replaced. What the next forward would pack before anything else is packed now, so that
        the file is as small as it can be; the last forward can then no longer be taken back without a trace.

        Args:
            path: of the file.
            ids: the tokens that the cache holds, `[B, T]`. The prompt without its last token is of the most use: a
                model needs that one for the first token of its answer.
            model: that filled the cache.

        Raises:
            CacheError: if the cache holds another number of tokens, or something that no file can hold.
            OutputError: if the file cannot be written.
        """
        tokens, held = torch.as_tensor(ids), self.get_seq_length()
        if not held:
            raise CacheError("the cache holds no tokens, so there is nothing to save; a prompt needs two at least")
        if tokens.ndim != 2 or tokens.shape[1] != held:
            raise CacheError(f"the cache holds {held} tokens of each sequence, and the ids are {list(tokens.shape)}")
        save_cache(Path(path), self.layers, self.plan, model, tokens)
        return Path(path)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values `[B, H_kv, S, D]` and return all of them, `[B, H_kv, T, D]`."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        read = [handle for handle in (keys, values) if isinstance(handle, Handle)]
        unread = max((handle.unread_tokens(key_states.shape[2]) for handle in read), default=0)
        quantized = sum(handle.quantized_tokens for handle in read) / 2 - unread
        evicted = max((handle.evicted_tokens for handle in read), default=0)
        self.attended.add(key_states, keys, quantized, evicted + unread)
        return keys, values

    @property
    def held(self) -> list[HeldPrompt]:
        """Return the layers, or groups of their KV heads, that hold a prompt until it is scored."""
        return [HeldPrompt(*each) for each in self._composed() if each[2].held is not None]

    def label(self, is_image: Tensor) -> None:
        """Tell which of the tokens that come next are of an image, `[B, T]`; all others are text.

        A plan may keep text rather than images (`cache.tokens.images`):

            cache.label(inputs.input_ids == model.config.image_token_id)
            model(**inputs, past_key_values=cache)

        Raises:
            CacheError: unless it is a boolean for each token of each sequence.
        """
        if is_image.ndim != 2 or is_image.dtype != torch.bool:
            raise CacheError(
                f"labels of images are {is_image.dtype} {list(is_image.shape)}; expected a boolean for each token of "
                "each sequence, [B, T], such as input_ids == model.config.image_token_id"
            )
        for _, _, layer in self._composed():
            layer.label(is_image)

    def _composed(self) -> Iterator[tuple[int, tuple[int, ...] | None, ComposedLayer]]:
        """Yield the layers that sort or transform, or the groups of their KV heads, each with its index and heads."""
        for index, layer in enumerate(self.layers):
            groups = layer.groups if isinstance(layer, GroupedLayer) else ((None, layer),)
            for heads, part in groups:
                if isinstance(part, ComposedLayer):
                    yield index, heads, part

    @contextmanager
    def reading_again(self, part: slice) -> Iterator[None]:
        """Within this block let the model read a part of the prompt that is held again, which scores it.

        Afterwards nothing of what it was given is in the cache.

        Raises:
            PolicyError: if a layer keeps a state that cannot be put back.
        """
        held = self.held
        others = {index: self.layers[index] for index in range(len(self.layers))}
        for index in {each.index for each in held}:
            others.pop(index)
        stateful = {each.index: each.layer for each in held if isinstance(each.layer, StatefulLayer)}
        kept = {index: layer for index, layer in others.items() if not isinstance(layer, DynamicLayer)}
        for index, layer in {**stateful, **kept}.items():
            raise PolicyError(
                f"layer {index} ({type(layer).__name__}) keeps a state that no second reading can be taken back from; "
                "use a score of tokens that reads a prompt once"
            )
        before, counted = {index: dict(vars(layer)) for index, layer in others.items()}, replace(self.attended)
        try:
            for each in held:
                each.layer.read_again(part)
            yield
        finally:
            for index, layer in others.items():
                vars(layer).update(before[index])
            for each in held:
                each.layer.read_again(None)
            self.attended = counted

    @property
    def nbytes(self) -> int:
        """Return the bytes in use by all layers."""
        return cache_nbytes(self)

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes held by all layers, room to grow included."""
        return sum(
            layer.allocated_bytes + layer.state_nbytes if isinstance(layer, MixedLayer) else stock_nbytes(layer)
            for layer in self.layers
        )


def _rotations(plan: Plan, config: PreTrainedConfig) -> Rotations | None:
    """Return the rotary positions that the plan's score of tokens reads keys without; None if it does not."""
    if plan.cache.tokens is None:
        return None
    name = plan.cache.tokens.score
    return rotations_of(config, name) if token_score(name).before_rope else None


def _check_groups(index: int, stock: Any, plan: Plan) -> None:
    """Raise PlanError if a layer cannot store its KV heads in groups."""
    if type(stock) is not DynamicLayer:
        raise PlanError(f"layer {index} keeps a state beside keys and values, so its KV heads cannot be in groups")
    score = "" if plan.cache.tokens is None else plan.cache.tokens.score
    if score.startswith(PRESS):
        raise PlanError(f"layer {index}: the score `{score}` is of all KV heads together, and the plan groups them")


def _kind(layer: LayerPlan, settings: CacheSettings) -> type[MixedLayer]:
    """Return the kind of layer that does what a plan asks of it."""
    if is_composed(settings):
        return ComposedLayer
    return CodedLayer if exact_tokens(layer, settings) else MixedLayer


def unquantized_cache(config: PreTrainedConfig) -> DynamicCache:
    """Return the empty cache that transformers itself would use."""
    return DynamicCache(config=config)
