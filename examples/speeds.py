"""Tokens that rows of `kvmix eval --systems` decode in a second of the processor, in turns, and the bytes they take.

    python examples/speeds.py builtin:tiny profiles/builtin--tiny/profile.yaml
    python examples/speeds.py builtin:tiny profiles/builtin--tiny/profile.yaml --preset transform-2 --preset kvzip

All rows hold the same context and take turns, some tokens each, so that a slow moment comes to all of them. Time is the
processor's in one thread, which other work on the machine changes less than the clock's. Beside the tokens in a second
is the median, over turns, of what the row does in the time of the first one, the unquantized cache, and the extremes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from transformers import Cache

from kvmix_cli import console, load_model
from kvmix_cli.cache.sizes import cache_nbytes
from kvmix_cli.cache.subject import Subject
from kvmix_cli.decoding.feed import feed, prefill
from kvmix_cli.errors import KvmixError
from kvmix_cli.models.loading import LoadedModel
from kvmix_cli.studies.directions import FoundProfile
from kvmix_cli.studies.leaderboard.systems import CHAMPION, system_plans
from kvmix_cli.texts import load_texts
from kvmix_cli.texts.tokens import cut_samples

Times = Mapping[str, Sequence[float]]
"""Seconds of the processor for a token, by row and turn."""


@torch.inference_mode()
def filled(loaded: LoadedModel, subject: Subject, context: Sequence[int], reserve: int) -> Cache:
    """Return a row's cache with a context in it, and room for `reserve` tokens."""
    cache = subject.cache(loaded.config, reserve=reserve)
    prefill(loaded, cache, context)
    return cache


@torch.inference_mode()
def in_turns(loaded: LoadedModel, caches: Mapping[str, Cache], answer: Sequence[int], turn: int) -> Times:
    """Return the times of every row, `turn` tokens of the answer at a time; the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in caches}
    for start in range(0, len(answer) - turn + 1, turn):
        for name, cache in caches.items():
            began = time.process_time()
            for _ in feed(loaded, cache, answer[start : start + turn], 1):
                pass
            times[name].append((time.process_time() - began) / turn)
    return {name: each[1:] for name, each in times.items()}


def table(times: Times, sizes: Mapping[str, int]) -> list[str]:
    """Return lines: a row's name, its bytes, tokens in a second, and those in the time of one of the first row."""
    first = next(iter(times.values()))
    lines = ["| row | KiB | tokens a second | against unquantized |", "|---|---|---|---|"]
    for name, own in times.items():
        ratios = [other / each for other, each in zip(first, own, strict=True)]
        against = f"{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        lines.append(f"| `{name}` | {sizes[name] / 1024:.0f} | {1 / median(own):.0f} | {against} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local folder or builtin:tiny")
    parser.add_argument("profile", type=Path, help="its profile")
    parser.add_argument("--preset", action="append", default=[], help="some rows beside `kivi-2`; all if not given")
    parser.add_argument("--stored-bits", type=float, default=2.5)
    parser.add_argument("--length", type=int, default=2048, help="tokens of the context")
    parser.add_argument("--turns", type=int, default=5, help="turns that are counted")
    parser.add_argument("--turn", type=int, default=8, help="tokens of a turn")
    given = parser.parse_args(arguments)
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
        times = in_turns(loaded, caches, ids[given.length :], given.turn)
    except KvmixError as error:
        console.fail(error)
        raise SystemExit(1) from error
    print("\n".join(table(times, held)))


if __name__ == "__main__":
    main()
