"""The processes that torchrun has started for one command: the share of each, and the bytes that they send each other.

Every process (rank) runs the same command on the same samples. Rank 0, the leader, reads and writes all files and is
the only one that prints; the others measure their share and send it. JSON and safetensors travel, never code, through
the store by which torchrun's processes find each other. Ranks wait for a message in Python, and look whether another
rank has failed meanwhile, so that the failure of one ends all.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from typing import Protocol

LAUNCHED = "TORCHELASTIC_RUN_ID"
"""Environment variable that torchrun sets, and nothing else does."""
PAUSE = 0.005
"""Seconds between two looks for a message."""
PART_BYTES = 4 * 2**20
"""Bytes of a message's parts; torch's store closes the connection at one of more than 8 MiB."""
_FAILED = "kvmix/failed"


def own_heads(heads: int, rank: int, ranks: int) -> slice:
    """Return the heads that one of several ranks has: each has as many, in order."""
    return slice(rank * heads // ranks, (rank + 1) * heads // ranks)


class RankStore(Protocol):
    """The methods that are used of a `torch.distributed.Store`."""

    def set(self, key: str, value: bytes, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, number: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def delete_key(self, key: str, /) -> bool: ...


class Ranks:
    """The ranks of a command, as one of them sees them; one process alone has nobody to talk to.

    Calls come in the same order on every rank, as of collective operations.

    Attributes:
        rank: number of this process, from 0.
        world: number of all processes.
        local: number of this process among those of the same machine.
        is_sharded: all ranks hold parts of one model, and measure every sample together. Otherwise each has a model
            of its own, and measures the samples whose number modulo `world` is its rank.
    """

    def __init__(
        self, rank: int = 0, world: int = 1, store: RankStore | None = None, *, local: int = 0, is_sharded: bool = False
    ) -> None:
        self.rank, self.world, self.local, self.is_sharded = rank, world, local, is_sharded
        self._store = store
        self._topics = 0

    @property
    def leads(self) -> bool:
        """Return whether this rank reads and writes files, and prints."""
        return self.rank == 0

    def connect(self) -> None:
        """Find the other ranks. Needs torch; does nothing in a process that is alone."""
        if self._store is None and self.world > 1:
            from torch.distributed.rendezvous import rendezvous

            self._store, *_ = next(iter(rendezvous("env://")))

    def sharded(self) -> Ranks:
        """Return the same ranks as holders of parts of one model."""
        return Ranks(self.rank, self.world, self._store, local=self.local, is_sharded=True)

    def is_mine(self, number: int) -> bool:
        """Return whether this rank measures a sample."""
        return self.is_sharded or number % self.world == self.rank

    def share(self, numbers: Sequence[int]) -> list[int]:
        """Return the samples, of these, that this rank measures."""
        return [number for number in numbers if self.is_mine(number)]

    def topic(self) -> str:
        """Return a name for messages that has not been used yet, the same on every rank."""
        self._topics += 1
        return f"kvmix/{'parts' if self.is_sharded else 'copies'}/{self._topics}"

    def send(self, topic: str, number: int, data: bytes) -> None:
        """Send the leader what was measured on a sample."""
        self._write(f"{topic}/{number}", data)

    def receive(self, topic: str, number: int) -> bytes:
        """Wait for what another rank has measured on a sample. Raises SystemExit if a rank has failed meanwhile."""
        key = f"{topic}/{number}"
        data = self._read(key)
        self._forget(key, data)
        return data

    def agree(self, data: bytes) -> bytes:
        """Return the leader's bytes on every rank, once all have got here. Raises SystemExit if a rank has failed."""
        if self.world == 1:
            return data
        key = self.topic()
        if not self.leads:
            found = self._read(key)
            self._connected.add(f"{key}/read", 1)
            return found
        self._write(key, data)
        while self._connected.add(f"{key}/read", 0) < self.world - 1:
            self._rest()
        self._forget(key, data)
        return data

    def claim_failure(self, code: int) -> bool:
        """Return whether this rank is the one that reports a failure: the first, or the leader before they have met.

        Args:
            code: exit code with which all ranks end.
        """
        if self._store is None:
            return self.leads
        mine = f"{self.rank} {code}"
        try:
            return self._store.compare_set(_FAILED, "", mine) == mine.encode()
        except RuntimeError:  # the store went with the process that kept it, which has reported its end
            return False

    @property
    def _connected(self) -> RankStore:
        if self._store is None:
            raise RuntimeError("the ranks have not met yet: call connect()")
        return self._store

    def _write(self, key: str, data: bytes) -> None:
        parts = range(0, len(data), PART_BYTES)
        for number, start in enumerate(parts):
            self._connected.set(f"{key}/part {number}", data[start : start + PART_BYTES])
        self._connected.set(key, str(len(parts)).encode())  # last: whoever finds it finds all parts

    def _read(self, key: str) -> bytes:
        while not self._has(key):
            self._rest()
        parts = int(self._connected.get(key))
        return b"".join(self._connected.get(f"{key}/part {number}") for number in range(parts))

    def _forget(self, key: str, data: bytes) -> None:
        for number in range(len(range(0, len(data), PART_BYTES))):
            self._connected.delete_key(f"{key}/part {number}")

    def _has(self, key: str) -> bool:
        try:
            return self._connected.check([key])
        except RuntimeError as error:  # the store went with the process that kept it
            raise SystemExit(1) from error

    def _rest(self) -> None:
        """Pause; raise SystemExit, with its exit code, if another rank has failed."""
        if self._has(_FAILED):
            raise SystemExit(int(self._connected.get(_FAILED).split()[1]))
        time.sleep(PAUSE)


ALONE = Ranks()
"""One process without others."""


@functools.cache
def current() -> Ranks:
    """Return the ranks that this process is one of: those of torchrun, or itself alone."""
    if LAUNCHED not in os.environ:
        return ALONE
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Ranks(rank, world, local=local)
