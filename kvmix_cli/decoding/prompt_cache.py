"""Packed caches of prompts in files: saved before the answer, loaded by a later run, and their sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cache.mixed import MixedCache
from ..cache.saving import CacheFile
from .footprint import measure_footprint

if TYPE_CHECKING:
    from transformers import Cache

    from ..cache.subject import Subject
    from ..models.loading import LoadedModel
    from ..plan import Plan


@dataclass(frozen=True)
class SavedPrompt:
    """The file that a packed cache was written to.

    Attributes:
        bytes: size of the file.
        tokens: tokens that it holds.
        bf16_bytes: bytes of an unquantized cache of these tokens at 16 bits.
        seconds: that writing took.
    """

    file: Path
    bytes: int
    tokens: int
    bf16_bytes: int
    seconds: float

    @property
    def compression(self) -> float:
        """Return how many times smaller the file is than a cache of 16 bits."""
        return self.bf16_bytes / self.bytes

    def as_json(self) -> dict[str, Any]:
        """Return the facts as plain data."""
        return {**asdict(self), "file": str(self.file), "compression": self.compression}


@dataclass(frozen=True)
class LoadedPrompt:
    """The file that a cache was loaded from.

    Attributes:
        bytes: size of the file.
        tokens: tokens that it holds.
        reused_tokens: of these, tokens that begin the prompt and are in the cache.
        seconds: that loading took.
    """

    file: Path
    bytes: int
    tokens: int
    reused_tokens: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return the facts as plain data."""
        return {**asdict(self), "file": str(self.file)}


@dataclass
class PromptFiles:
    """The files that the cache of a prompt is loaded from and saved to, each perhaps none.

    Attributes:
        loaded, saved: what was loaded and saved, once it has been.
    """

    load_from: Path | None = None
    save_to: Path | None = None
    loaded: LoadedPrompt | None = None
    saved: SavedPrompt | None = None

    def check(self, plan: Plan | None) -> None:
        """Raise CacheError, before a model is loaded, if the file to load is damaged or of another plan."""
        if self.load_from is not None and plan is not None:
            CacheFile.open(self.load_from).check_plan(plan)

    def cache(self, subject: Subject, loaded: LoadedModel, ids: Sequence[int], reserve: int) -> Cache:
        """Return an empty cache, or the loaded one as far as it holds the beginning of the prompt `ids`.

        Raises:
            CacheError: if the file is of no use.
        """
        if self.load_from is None or subject.plan is None:
            return subject.cache(loaded.config, reserve)
        start = time.perf_counter()
        file = CacheFile.open(self.load_from)
        cache = MixedCache.load(file, subject.plan, loaded.model, [list(ids)], reserve)
        seconds, size = time.perf_counter() - start, self.load_from.stat().st_size
        self.loaded = LoadedPrompt(self.load_from, size, file.header.tokens, cache.get_seq_length(), seconds)
        return cache

    def saving(self, cache: Cache, loaded: LoadedModel, ids: Sequence[int]) -> Callable[[], None] | None:
        """Return what saves the cache when it holds all of a prompt but the last token; None if there is no file."""
        if self.save_to is None or not isinstance(cache, MixedCache):
            return None
        path, planned = self.save_to, cache

        def save() -> None:
            start = time.perf_counter()
            planned.save(path, [list(ids[:-1])], loaded.model)
            seconds, size = time.perf_counter() - start, path.stat().st_size
            unquantized = measure_footprint(planned, planned.plan, loaded.model.dtype.itemsize).bf16_bytes
            self.saved = SavedPrompt(path, size, len(ids) - 1, unquantized, seconds)

        return save

    def as_json(self) -> dict[str, Any]:
        """Return what was loaded and saved as plain data, `loaded_cache` and `saved_cache`; None for nothing."""
        return {
            "loaded_cache": None if self.loaded is None else self.loaded.as_json(),
            "saved_cache": None if self.saved is None else self.saved.as_json(),
        }
