"""Tokens that rows of `kvmix eval --systems` decode in a second of the processor, in turns, and the bytes they take.

    python examples/speeds.py builtin:tiny profiles/builtin--tiny/profile.yaml
    python examples/speeds.py builtin:tiny profiles/builtin--tiny/profile.yaml --preset transform-2 --preset kvzip

All rows hold the same context and take turns, some tokens each. Time is the processor's in one thread, which other work
on the machine changes less than the clock's. Before each turn of a row the unquantized cache decodes the same tokens,
so that a slow moment comes to both: beside the tokens in a second is the median, over turns, of what the row does in
the time that the unquantized cache has just taken, with the quartiles.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles

import torch
from transformers import Cache

from kvmix_cli import console, load_model
from kvmix_cli.cache.sizes import cache_nbytes
from kvmix_cli.cache.subject import UNQUANTIZED, Subject
from kvmix_cli.decoding.feed import feed, prefill
from kvmix_cli.errors import KvmixError
from kvmix_cli.models.loading import LoadedModel
from kvmix_cli.studies.directions import FoundProfile
from kvmix_cli.studies.leaderboard.systems import CHAMPION, system_plans
from kvmix_cli.texts import load_texts
from kvmix_cli.texts.tokens import cut_samples

Times = Mapping[str, Sequence[tuple[float, float]]]
"""Seconds of the processor for a token, by row and turn: of the unquantized cache, and then of the row."""


@torch.inference_mode()
def filled(loaded: LoadedModel, subject: Subject, context: Sequence[int], reserve: int) -> Cache:
    """Return a row's cache with a context in it, and room for `reserve` tokens."""
    cache = subject.cache(loaded.config, reserve=reserve)
    prefill(loaded, cache, context)
    return cache


@torch.inference_mode()
def in_turns(
    loaded: LoadedModel, unquantized: Cache, caches: Mapping[str, Cache], answer: Sequence[int], turn: int
) -> Times:
    """Return the times of every row, `turn` tokens of the answer at a time; the first turn is not counted."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in caches}
    for start in range(0, len(answer) - turn + 1, turn):
        part = answer[start : start + turn]
        for name, cache in caches.items():
            beside = seconds(loaded, unquantized, part)
            unquantized.crop(-turn)
            times[name].append((beside, seconds(loaded, cache, part)))
        seconds(loaded, unquantized, part)
    return {name: each[1:] for name, each in times.items()}


def seconds(loaded: LoadedModel, cache: Cache, part: Sequence[int]) -> float:
    """Return the seconds of the processor that a token takes, of some that are decoded one at a time."""
    began = time.process_time()
    for _ in feed(loaded, cache, part, 1):
        pass
    return (time.process_time() - began) / len(part)


def table(times: Times, sizes: Mapping[str, int]) -> list[str]:
    """Return lines: a row's name, its bytes, tokens in a second, and those in the time of an unquantized one."""
    beside = median(other for pairs in times.values() for other, _ in pairs)
    lines = ["| row | KiB | tokens a second | against unquantized |", "|---|---|---|---|"]
    lines.append(f"| {UNQUANTIZED} | {sizes[UNQUANTIZED] / 1024:.0f} | {1 / beside:.0f} | - |")
    for name, pairs in times.items():
        low, middle, high = quantiles((other / own for other, own in pairs), n=4, method="inclusive")
        speed = 1 / median(own for _, own in pairs)
        lines.append(f"| `{name}` | {sizes[name] / 1024:.0f} | {speed:.0f} | {middle:.2f} [{low:.2f}, {high:.2f}] |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local folder or builtin:tiny")
    parser.add_argument("profile", type=Path, help="its profile")
    parser.add_argument("--preset", action="append", default=[], help="some rows beside `kivi-2`; all if not given")
    parser.add_argument("--stored-bits", type=float, default=2.5)
    parser.add_argument("--length", type=int, default=2048, help="tokens of the context")
    parser.add_argument("--turns", type=int, default=11, help="turns that are counted, at least 2")
    parser.add_argument("--turn", type=int, default=8, help="tokens of a turn")
    given = parser.parse_args(arguments)
    if given.turns < 2:
        parser.error("--turns: quartiles need at least 2")
    torch.set_num_threads(1)
    try:
        loaded, measured = load_model(given.model), FoundProfile.load(given.profile)
        names = (CHAMPION, *given.preset) if given.preset else ()
        sizes = (given.stored_bits,)
        found, _ = system_plans(loaded.info, given.length, names=names, stored_bits=sizes, measured=measured)
        new = given.turn * (given.turns + 1)
        texts = load_texts(held_out=True)
        ids = list(cut_samples(loaded.tokenizer, texts, 1, given.length + new, 0, max_length=loaded.max_length)[0])
        rows = [Subject(), *(Subject(each.name, each.plan) for each in found)]
        caches = {each.name: filled(loaded, each, ids[: given.length], len(ids)) for each in rows}
        held = {name: cache_nbytes(cache) for name, cache in caches.items()}
        unquantized = caches.pop(UNQUANTIZED)
        times = in_turns(loaded, unquantized, caches, ids[given.length :], given.turn)
    except KvmixError as error:
        console.fail(error)
        raise SystemExit(1) from error
    print("\n".join(table(times, held)))


if __name__ == "__main__":
    main()
