"""All architectures through the matrix, each with a time limit in a process of its own; interrupted, it goes on.

python tests/support/matrix_pool.py RESULTS.jsonl [TYPE ...]     types that are in the file already are kept
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from matrix import Outcome, examine
from shrinking import model_types

SECONDS = 120
"""Most time for one architecture; most take a second or two."""
AT_ONCE = 25
"""Architectures that one process examines before another takes its place, and memory is given back."""


def run_matrix(
    results: Path, types: Iterable[str], workers: int = 1, seconds: float = SECONDS, announce: bool = False
) -> dict[str, Outcome]:
    """Return the outcomes of some types; those in `results` are taken from there, new ones are added to it."""
    found = read_outcomes(results)
    todo = [name for name in types if name not in found]
    places = [_Place(seconds) for _ in range(min(workers, len(todo)))]
    with results.open("a", encoding="utf-8") as file:
        while todo or any(place.is_busy for place in places):
            for place in places:
                if todo and not place.is_busy:
                    place.give(todo.pop(0))
                if (outcome := place.take()) is not None:
                    found[outcome.type] = outcome
                    file.write(json.dumps(asdict(outcome)) + "\n")
                    file.flush()
                    if announce:
                        print(f"{outcome.type}: {outcome.kind} {outcome.reason}", flush=True)  # noqa: T201
    for place in places:
        place.stop()
    return dict(sorted(found.items()))


def read_outcomes(results: Path) -> dict[str, Outcome]:
    """Return the outcomes in a file, none if there is no file. Of a type that is there twice the last counts."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    return {outcome.type: outcome for outcome in outcomes}


class _Place:
    """A process that examines one architecture after another, and is replaced if one hangs or ends it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._type: str | None = None
        self._process: multiprocessing.Process | None = None

    @property
    def is_busy(self) -> bool:
        """Return whether an architecture is in work."""
        return self._type is not None

    def give(self, model_type: str) -> None:
        """Let an architecture be examined."""
        if self._process is not None and self._given == AT_ONCE:
            self.stop()
        if self._process is None:
            self._start()
        self._type, self._begun = model_type, time.monotonic()
        self._given += 1
        self._connection.send(model_type)

    def take(self) -> Outcome | None:
        """Return the outcome of the architecture in work; None if there is none yet."""
        if self._type is None:
            return None
        seconds = time.monotonic() - self._begun
        try:
            if self._connection.poll(0.2):
                outcome = self._connection.recv()
            elif seconds < self._seconds:
                return None
            else:
                outcome = Outcome(self._type, reason=f"takes longer than {self._seconds:.0f} s")
                self._kill()
        except EOFError:
            outcome = Outcome(self._type, reason="the process crashed")
            self._kill()
        self._type, outcome.seconds = None, round(seconds, 1)
        return outcome

    def stop(self) -> None:
        """Let the process end, one that does not by force."""
        if self._process is not None:
            with suppress(OSError):
                self._connection.send(None)
            self._process.join(5)
            self._kill()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), daemon=True)
        self._process.start()
        self._given = 0
        other.close()

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._process = None


def _serve(connection: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    for model_type in iter(connection.recv, None):
        connection.send(examine(model_type))


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("types", nargs="*", default=model_types())
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    run_matrix(options.results, options.types, options.workers, announce=True)


if __name__ == "__main__":
    main(sys.argv[1:])
