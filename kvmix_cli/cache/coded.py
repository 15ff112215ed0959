"""A layer of transform codes that keeps a few tokens exact: those that its queries attend to most."""

from __future__ import annotations

from collections.abc import Callable

from kvmix_kernels.layout import Kind
from kvmix_kernels.runtime.fallback import warn_once
from kvmix_kernels.segments import Segments
from torch import Tensor

from ..plan import TransformTensor
from ..plan.sizes import exact_tokens, window_widths
from .archive import Archive
from .observation import AttentionCall
from .queued import QueryQueue, QueuedCall
from .store import Store
from .tokens.exact import NEAR, ExactTokens
from .watching import WatchingLayer


class CodedLayer(WatchingLayer):
    """Keys and values of one layer in transform codes, with exact tokens.

    A model whose attention shows no queries is served, too: the error of the codes then decides alone.
    """

    _is_shown = True
    _queue: QueryQueue

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make stores and what chooses exact tokens. Raises PlanError."""
        chooser: Kind = "key" if isinstance(self.plan.k, TransformTensor) else "value"
        window = self.settings.window.keep(self.settings.page, min(window_widths(self.plan, self.settings)))
        near = min(NEAR, window // 2)
        self._exact = ExactTokens(exact_tokens(self.plan, self.settings), key_states, chooser, near)
        self._queue = QueryQueue()
        super().lazy_initialization(key_states, value_states)

    @property
    def nbytes(self) -> int:
        """Return the bytes in use."""
        return super().nbytes + self._chosen_bytes

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes held, room to grow included."""
        return super().allocated_bytes + self._chosen_bytes

    @property
    def _chosen_bytes(self) -> int:
        return 0 if self._exact is None else self._exact.nbytes + self._queue.nbytes

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._exact, self._is_shown = None, True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens. Of those that stay no other tokens become exact."""
        self._catch_up()
        super().crop(tokens_to_remove)
        if self._exact is None or not tokens_to_remove:
            return
        page = self.settings.page
        pages = max(store.packed_tokens for store in self.stores) // page
        self._exact.crop(-tokens_to_remove, self._tail_tokens, pages, page)

    def exchange(self, archive: Archive, examples: tuple[Tensor, Tensor]) -> None:
        """Give everything held to an archive, or take it; see `MixedLayer.exchange`."""
        self._catch_up()
        super().exchange(archive, examples)
        self._is_shown = bool(archive.number("shown", self._is_shown))
        if self._exact is not None:
            kinds = zip(self.plan.tensors, examples, strict=True)
            coded = {kind: example for (tensor, kind), example in kinds if isinstance(tensor, TransformTensor)}
            pages = max(store.packed_tokens for store in self.stores) // self.settings.page
            self._exact.exchange(archive.part("exact", examples[0]), coded, pages, self.settings.page)

    @property
    def _tail_tokens(self) -> int:
        """Return the tokens that wait to be packed; keys or values in full precision have longer tails."""
        return min(store.tail_tokens for store in self.stores)

    @property
    def _needs_queries(self) -> bool:
        return self._is_shown

    def _unshown(self) -> None:
        """Go on without queries, and say so."""
        self._is_shown, self._unseen = False, False
        warn_once(
            "the model's attention does not show its queries, so the exact tokens of transform codes are chosen by "
            "their error alone; load the model with attn_implementation='kvmix' for a better choice"
        )
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self._begin(*waiting, None)
        self._pack_early()

    def _learn(self, call: AttentionCall, keys: Tensor, transformed: Callable[[Tensor], Tensor]) -> None:
        """Add the attention that tokens receive, now or a few decoding steps later."""
        if self._exact is not None:
            queued = QueuedCall(call, keys, self.get_seq_length(), self._tail_tokens)
            self._learn_from(self._exact, self._queue.add(queued))

    def _catch_up(self) -> None:
        """Learn from the queries that wait, before what they attended to changes."""
        if self._exact is not None:
            self._learn_from(self._exact, self._queue.take())

    def _learn_from(self, exact: ExactTokens, calls: list[QueuedCall]) -> None:
        for queued in calls:
            exact.learn(queued.call, self.stores[0].sinks)
            exact.attention.learn(queued.call, queued.keys, queued.tokens, queued.tail)

    def _add(self, keys: Tensor, values: Tensor) -> tuple[Segments, Segments]:
        if self._queue and any(store.due for store in self.stores):
            self._catch_up()
        return super()._add(keys, values)

    def _in_step(self, pack: Callable[[Store], int]) -> tuple[int, int]:
        """Let keys and values pack, and forget the attention of the tokens that have left the tail."""
        counts = super()._in_step(pack)
        if self._exact is not None:
            self._exact.forget_oldest(max(counts))
        return counts

    def _apply(self, change: Callable[[Tensor], Tensor]) -> None:
        self._catch_up()
        super()._apply(change)
        if self._exact is not None:
            self._exact.apply(change)
