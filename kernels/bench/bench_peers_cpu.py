"""Decoding on a CPU with what a user would pick: transformers' caches, llama.cpp, vLLM and kvmix, in turns.

    python kernels/bench/bench_peers_cpu.py [--model builtin:tiny] [--contexts 2048] [--fill text] [--out peers.jsonl]
    python kernels/bench/bench_peers_cpu.py --model random-1b --contexts 2048,16384 --fill random --save
    python kernels/bench/bench_peers_cpu.py --table

A cell is one model, one context and one content of the caches. With `--fill text` each peer reads the same held-out
text as a prompt, which is timed, and then decodes what follows in it, so that KL can be told: to the unquantized cache
of the same engine, and of unquantized ones to DynamicCache. With `--fill random` the caches are filled with random keys
and values without reading a prompt, which takes minutes where it is long (vLLM reads one of random tokens), and there
is no KL. Peers take turns: one step that is not timed, then `--steps` that are, `--rounds` times. All have the same
weights in bfloat16 (or in the dtype that the name has) and two threads; with `--cpu-time` one thread, whose own time is
taken, which other work on the machine disturbs less. Medians; `ratio` is the time of DynamicCache in bfloat16 over the
peer's, `over 16 bits` the peer's over that of 16 bits in the same engine. `peak` is the peak resident memory of a
process that has this peer alone, weights and Python included: it reads a prompt, or fills its cache as `--fill` says,
and decodes three tokens. vLLM's process is of one peer in any case, and no other is started for it.

A finished cell is a line of the file, and is not measured again. llama.cpp needs `pip install llama-cpp-python`, the
quantized caches of transformers `pip install optimum-quanto hqq`; vLLM runs in an environment of its own, which
`make vllm-env` makes and `--vllm` names. What is named by `--peers` and not installed is refused; if none are named, it
is left out.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import results
import torch
from peers import BASELINE, IDS, RANDOM, VLLM, Peer, Peers, is_apart, lacking, unquantized, versions
from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from kvmix_cli.cache import register
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.machine import processor
from kvmix_cli.evaluation.tasks.throughput.text import stretch
from kvmix_cli.journal import Journal
from kvmix_cli.models.loading import LoadedModel

FILLS = ("text", "random")


class Timed(TypedDict):
    """Numbers of one peer in a cell: seconds of each prompt, milliseconds of each step, bytes, KL in nats a token."""

    prompt_s: list[float]
    step_ms: list[float]
    nbytes: int
    peak: int
    kl: float | None


class Cell(TypedDict):
    """Everything measured in one cell."""

    date: str
    machine: str
    threads: int
    versions: dict[str, str]
    model: str
    context: int
    fill: str
    cpu_time: bool
    peers: dict[str, Timed]


def measure(peers: Peers, names: Sequence[str], context: int, options: argparse.Namespace) -> dict[str, Timed]:
    """Return the times of all peers in one cell."""
    peers.prepare(names)
    peaks = {name: 0 if is_apart(name) else peak(name, context, options) for name in names}
    found: dict[str, Timed] = {
        name: {"prompt_s": [], "step_ms": [], "nbytes": 0, "peak": peaks[name], "kl": None} for name in names
    }
    ids = text(peers.loaded, peers.room, peers.model)
    made = {name: peers.makers[name]() for name in names}
    for _ in range(options.prompts if options.fill == "text" else 0):
        for name, peer in made.items():
            start = peer.seconds(cpu_time=options.cpu_time)
            peer.read(ids[:context])
            found[name]["prompt_s"].append(peer.seconds(cpu_time=options.cpu_time) - start)
            print(f"{name}: read {context} tokens in {found[name]['prompt_s'][-1]:.1f} s", file=sys.stderr)
    for peer in made.values():
        if options.fill == "random":
            peer.fill(context)
    following = iter(ids[context:])
    logits: dict[str, list[Tensor]] = {name: [] for name in names}
    for _ in range(options.rounds):
        tokens = [next(following) for _ in range(1 + options.steps)]
        for name, peer in made.items():
            for number, (seconds, predicted) in enumerate(steps(peer, tokens, cpu_time=options.cpu_time)):
                logits[name].append(predicted)
                if number:
                    found[name]["step_ms"].append(1e3 * seconds)
    for name, peer in made.items():
        found[name]["nbytes"] = peer.nbytes
        if is_apart(name):
            found[name]["peak"] = peer.peak
        reference = reference_of(name)
        is_told = options.fill == "text" and peers.model != RANDOM and name != BASELINE
        if is_told and reference in logits:
            found[name]["kl"] = divergence(logits[reference], logits[name])
    return found


def peak(name: str, context: int, options: argparse.Namespace) -> int:
    """Return the peak resident bytes of a process that decodes with one peer alone."""
    passed = ["--model", options.model, "--weights", str(options.weights), "--contexts", str(context)]
    passed += ["--threads", str(torch.get_num_threads()), "--fill", options.fill, "--vllm", str(options.vllm)]
    passed += ["--rounds", str(options.rounds), "--steps", str(options.steps), "--alone", name]
    passed += [] if options.profile is None else ["--profile", str(options.profile)]
    done = subprocess.run([sys.executable, __file__, *passed], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def alone(name: str, context: int, options: argparse.Namespace) -> int:
    """Read a prompt of no meaning or fill the cache, decode three tokens, and return the peak bytes of the process."""
    room = room_of(context, options)
    peer = Peers(options.model, options.profile, options.weights, room, options.vllm, is_blank=True).makers[name]()
    if options.fill == "text":
        peer.read([place % IDS for place in range(context)])
    else:
        peer.fill(context)
    for token in range(3):
        peer.step(token)
    return peer.peak


def room_of(context: int, options: argparse.Namespace) -> int:
    """Return the tokens that a cache holds in the end: the context and at least three more."""
    return context + max(3, options.rounds * (1 + options.steps))


def steps(peer: Peer, tokens: Iterable[int], *, cpu_time: bool) -> Iterator[tuple[float, Tensor]]:
    """Decode known tokens one by one; yield the seconds of each and its logits."""
    for token in tokens:
        start = peer.seconds(cpu_time=cpu_time)
        logits = peer.step(token)
        yield peer.seconds(cpu_time=cpu_time) - start, logits


def reference_of(name: str) -> str:
    """Return the peer whose predictions a peer's are compared with: another engine's arithmetic is not the cache's."""
    full = unquantized(name)
    return BASELINE if name == full or name.startswith("kvmix") else full


def divergence(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the mean KL of predictions, in nats a token."""
    p, q = (torch.stack(list(rows)).double().log_softmax(-1) for rows in (reference, other))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def text(loaded: LoadedModel, length: int, model: str) -> Sequence[int]:
    """Return held-out text for a model that has a tokenizer, and random ids for one that has none."""
    if model == RANDOM:
        return torch.randint(loaded.vocabulary, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    return stretch(loaded, Settings(), length)


def chosen(named: str | None, known: Iterable[str], vllm: Path) -> list[str]:
    """Return the peers to compare; say which are left out, and refuse those that are named and cannot be had."""
    if named is None:
        missing = {name: package for name in known if (package := lacking(name, vllm)) is not None}
        for name, package in missing.items():
            print(f"left out: {name} needs {package}, which is not installed")
        return [name for name in known if name not in missing]
    names = [name.strip() for name in named.split(",")]
    for name in names:
        if name not in known:
            raise SystemExit(f"no peer {name!r}; known are {', '.join(known)}")
        if (package := lacking(name, vllm)) is not None:
            raise SystemExit(f"{name} needs {package}, which is not installed: install it, or leave {name} out")
    return names


def medians(cell: Cell, work: str) -> dict[str, tuple[float, float | None]]:
    """Return each peer's median milliseconds of `prompt_s` or `step_ms`, and the baseline's over it if it is there."""
    factor = 1e3 if work == "prompt_s" else 1.0
    times = {name: timed[work] for name, timed in cell["peers"].items()}  # type: ignore[literal-required]
    ms = {name: factor * statistics.median(each) for name, each in times.items() if each}
    return {name: (each, ms[BASELINE] / each if BASELINE in ms else None) for name, each in ms.items()}


def table(cell: Cell) -> list[str]:
    """Return a cell as a Markdown table."""
    prompts, steps = medians(cell, "prompt_s"), medians(cell, "step_ms")
    libraries = ", ".join(f"{name} {version}" for name, version in cell["versions"].items())
    rows = [
        f"\n{cell['model']}, {cell['context']} tokens, {cell['fill']}: {cell['machine']}, threads: {cell['threads']}"
        f"{', time of the thread' if cell['cpu_time'] else ''}, "
        f"{libraries}, {cell['date']}\n",
        "| cache | prompt, tokens/s | decode, tokens/s | ms | ratio | over 16 bits | cache, MiB | peak, MiB | KL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (ms, ratio) in steps.items():
        timed = cell["peers"][name]
        prompt = f"{1e3 * cell['context'] / prompts[name][0]:.0f}" if name in prompts else ""
        kl = "" if timed["kl"] is None else f"{timed['kl']:.5f}"
        full = unquantized(name)
        over = f"{ms / steps[full][0]:.2f}x" if full in steps else ""
        over_it = "" if ratio is None else f"{ratio:.2f}x"
        sizes = f"{timed['nbytes'] / 2**20:.1f} | {timed['peak'] / 2**20:.0f}"
        rows.append(f"| {name} | {prompt} | {1e3 / ms:.2f} | {ms:.1f} | {over_it} | {over} | {sizes} | {kl} |")
    return rows


def save(cell: Cell) -> None:
    """Append the medians of a cell to results.csv."""
    op = "peers-cpu-time" if cell["cpu_time"] else "peers"
    row = {"shape": f"{cell['model']} bfloat16", "context": cell["context"]}
    rows: list[dict[str, object]] = []
    for work in ("prompt_s", "step_ms"):
        what = {**row, "op": f"{op} {work.partition('_')[0]}"}
        for name, (ms, ratio) in medians(cell, work).items():
            rows.append({**what, "name": name, "ms": round(ms, 2), "ratio": "" if ratio is None else round(ratio, 2)})
    results.append(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="builtin:tiny", help=f"hub id, local folder, builtin:tiny or {RANDOM}")
    parser.add_argument("--profile", type=Path, help="with directions for transform codes; without one, random ones")
    parser.add_argument("--contexts", default="2048")
    parser.add_argument("--fill", choices=FILLS, default="text")
    parser.add_argument("--peers", help="names, separated by commas; all that are installed by default")
    parser.add_argument("--prompts", type=int, default=3, help="how often each peer reads the prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of a round that are timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and its own time")
    parser.add_argument("--out", type=Path, default=Path("peers.jsonl"))
    parser.add_argument("--weights", type=Path, default=Path("peers-weights"), help="folder of what llama.cpp reads")
    parser.add_argument("--vllm", type=Path, default=VLLM, help="Python of the environment that has vLLM")
    parser.add_argument("--save", action="store_true", help="append medians to results.csv")
    parser.add_argument("--alone", metavar="PEER", help="only print the peak resident bytes of one peer's process")
    parser.add_argument("--table", action="store_true", help="only show what is in the file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    register()
    if options.alone is not None:
        print(alone(options.alone, int(options.contexts), options))
        return
    with Journal(options.out, None, TypeAdapter(Cell), resume=True) as journal:
        for context in [] if options.table else map(int, options.contexts.split(",")):
            run(journal, context, options)
        for cell in journal.records:
            print("\n".join(table(cell)))


def run(journal: Journal[Any], context: int, options: argparse.Namespace) -> None:
    """Measure a cell, unless the file has it."""
    room = room_of(context, options)
    peers = Peers(options.model, options.profile, options.weights, room, options.vllm)
    names = chosen(options.peers, peers.makers, options.vllm)
    model = Path(options.model).name
    at = (model, context, options.fill, options.cpu_time, names)
    for cell in journal.records:
        if (cell["model"], cell["context"], cell["fill"], cell["cpu_time"], [*cell["peers"]]) == at:
            return
    limit = peers.loaded.max_length
    if options.fill == "text" and limit is not None and room > limit:
        raise SystemExit(f"{options.model} takes {limit} tokens, and {room} are wanted: use --fill random")
    measured: Cell = {
        "date": date.today().isoformat(),
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "versions": versions(options.vllm),
        "model": model,
        "context": context,
        "fill": options.fill,
        "cpu_time": options.cpu_time,
        "peers": measure(peers, names, context, options),
    }
    journal.append(measured)
    if options.save:
        save(measured)


if __name__ == "__main__":
    main()
