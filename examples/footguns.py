"""The measurements behind docs/footguns.md, on the built-in model.

    python examples/footguns.py               # all of them: some minutes on one core
    python examples/footguns.py one_pass      # some of them
    python examples/footguns.py --limit 2     # fewer samples

Each function measures one thing in the wrong way and in the right way, and gives the rows of a table.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from kvmix_cli import Plan, console, load_model
from kvmix_cli.cache.subject import Subject
from kvmix_cli.evaluation import get_task
from kvmix_cli.evaluation.base import Sample, Settings
from kvmix_cli.evaluation.bootstrap import ratio
from kvmix_cli.evaluation.results import Estimate, Report
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.plan import CacheSettings

LOADED = load_model("builtin:tiny", device="cpu")
MODEL, INFO = LOADED.model, LOADED.info
FULL = Subject()
NEW = 32
"""Tokens that are decoded one by one."""
LAST = 60
"""Tokens whose distributions are compared."""


class Table(NamedTuple):
    """Results of one function."""

    title: str
    columns: Sequence[str]
    rows: list[list[Any]]


def uniform(bits: int, **cache: Any) -> Subject:
    """Return a plan of one width everywhere, with the defaults of the command line."""
    return Subject(f"{bits} bits", Plan.uniform(INFO, bits, bits, CacheSettings(**cache)))


def run(task: str, subjects: Sequence[Subject], **settings: Any) -> Report:
    return run_task(get_task(task), LOADED, subjects, Settings(**settings))


def documents(limit: int, length: int = 1024) -> list[Sample]:
    settings = Settings(limit=limit, length=length)
    return list(get_task("perplexity").samples(LOADED, settings))


def one_pass(limit: int = 10) -> Table:
    """Return the perplexity of a single forward, and of reading the text back through the cache."""
    subjects = [FULL, uniform(2), uniform(1)]
    single = []
    for subject in subjects:
        loss = tokens = 0.0
        for sample in documents(limit):
            ids = torch.tensor([sample.ids])
            logits = forward(subject.cache(LOADED.config, reserve=len(sample.ids)), sample.ids)
            loss += cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").item()
            tokens += len(sample.ids) - 1
        single.append(math.exp(loss / tokens))
    steps = {step: run("perplexity", subjects[1:], limit=limit, step=step).rows for step in (768, 256, 32)}
    rows = [
        [subject.name, single[index], *(steps[step][index].value("perplexity") for step in steps)]
        for index, subject in enumerate(subjects)
    ]
    return Table("Perplexity", ("cache", "one pass", *(f"in steps of {step}" for step in steps)), rows)


def first_token(limit: int = 10) -> Table:
    """Count prompts whose next token's logits at 1 bit are, bit for bit, those of the unquantized cache."""
    same = [0, 0]
    for sample in documents(limit):
        caches = [subject.cache(LOADED.config, reserve=len(sample.ids)) for subject in (FULL, uniform(1))]
        for turn, ids in enumerate((sample.ids[:-1], sample.ids[-1:])):
            full, one = (forward(cache, ids)[-1] for cache in caches)
            same[turn] += torch.equal(full, one)
    return Table(
        "Logits that do not depend on the cache",
        ("token", "prompts", "the same at 1 bit"),
        [["first", limit, same[0]], ["second", limit, same[1]]],
    )


def windows(limit: int = 10) -> Table:
    """Measure the damage that 1 bit does, by length of the text."""
    rows: list[list[Any]] = []
    for length in (160, 320, 640, 1280):
        row = run("perplexity", [uniform(1)], limit=limit, length=length, prefix=length - 60).plans[0]
        rows.append([length, 100 * row.quantized_share, row.metrics["perplexity_increase_percent"]])
    return Table("1 bit everywhere", ("tokens", "quantized %", "perplexity, % more"), rows)


def unequal_bytes(limit: int = 10) -> Table:
    """Measure what a plan stores and loses, by width and group size: perplexity and recall."""
    plans = [(bits, group) for bits, group in ((2, 64), (2, 32), (2, 16), (3, 64))]
    subjects = [Subject(f"{b} bits, groups of {g}", uniform(b, group_size=g).plan) for b, g in plans]
    perplexity, recall = (run(task, subjects, limit=limit) for task in ("perplexity", "recall"))
    rows: list[list[Any]] = []
    for one, other in zip(perplexity.rows, recall.rows, strict=True):
        increase, recalled = one.metrics.get("perplexity_increase_percent", 0.0), other.metrics["recalled"]
        rows.append([one.plan, one.nominal_bits, one.stored_bits, increase, round(recalled.value)])
    return Table("Width and groups", ("cache", "nominal", "stored", "perplexity, % more", "values recalled"), rows)


def pairing(limit: int = 10) -> Table:
    """Measure the interval of a number, and of its difference on the same samples."""
    full, quantized = run("perplexity", [uniform(2)], limit=limit).rows
    before = full.metrics["perplexity"]
    added = quantized.metrics["loss_increase"].map(lambda nats: before.value * math.expm1(nats))
    rows: list[list[Any]] = [["perplexity", before, quantized.metrics["perplexity"], added]]
    full, quantized = run("recall", [uniform(2)], limit=limit).rows
    differences = [a["recalled"] - b["recalled"] for a, b in zip(quantized.records, full.records, strict=True)]
    lost = ratio(differences, [record["values"] for record in full.records])
    rows.append(["recall", full.metrics["recall"], quantized.metrics["recall"], lost])
    return Table("95 % intervals", ("task", "unquantized", "2 bits", "difference, paired"), rows)


def tokens_per_second(limit: int = 1) -> Table:
    """State one run as three different speeds."""
    ids = documents(1, length=2000)[0].ids
    cache = uniform(2).cache(LOADED.config, reserve=len(ids))
    start = time.perf_counter()
    forward(cache, ids[:-NEW])
    prompt = time.perf_counter()
    for token in ids[-NEW:]:
        forward(cache, [token])
    end = time.perf_counter()
    rows: list[list[Any]] = [
        ["all tokens in all the time", len(ids) / (end - start)],
        ["new tokens in all the time", NEW / (end - start)],
        ["new tokens in their own time: decoding", NEW / (end - prompt)],
    ]
    return Table(f"{len(ids) - NEW} tokens of prompt, {NEW} new ones", ("counted", "tokens/s"), rows)


def left_padding(limit: int = 10) -> Table:
    """Measure how far a text's last predictions move when it is quantized, and when padding stands before it."""
    rows: list[list[Any]] = []
    for bits in (16, 4, 2):
        lost = moved = 0.0
        for sample in documents(limit):
            full, alone = (continued(sample.ids, subject) for subject in (FULL, uniform(bits)))
            lost += divergence(full, alone) / limit
            moved += divergence(alone, continued(sample.ids, uniform(bits), padding=1000)) / limit
        rows.append([bits, lost, moved])
    return Table("KL divergence, nats a token", ("bits", "by quantizing", "by 1000 tokens of padding before it"), rows)


def requantizing(limit: int = 1) -> Table:
    """Measure the error of 512 tokens' keys in transformers' caches, after the prompt and 1024 tokens later."""
    from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer

    kinds = (("quanto", QuantoQuantizedLayer, 0), ("HQQ", HQQQuantizedLayer, 1), ("HQQ", HQQQuantizedLayer, 0))
    rows: list[list[Any]] = []
    for name, kind, axis in kinds:
        for bits in (4, 2):
            layer = kind(nbits=bits, axis_key=axis, axis_value=axis, q_group_size=64, residual_length=128)
            before, after = requantized(layer)
            rows.append([f"{name}, axis {axis}", bits, before, after, after / before])
    columns = ("cache", "bits", "after the prompt", "1024 tokens later", "times")
    return Table("Mean squared error of keys", columns, rows)


# Parts


@torch.inference_mode()
def forward(cache: Any, ids: Sequence[int]) -> Tensor:
    """Return logits `[tokens, vocabulary]`."""
    return MODEL(input_ids=torch.tensor([list(ids)]), past_key_values=cache, use_cache=True).logits[0].float()


@torch.inference_mode()
def continued(ids: Sequence[int], subject: Subject, padding: int = 0) -> Tensor:
    """Return log-probabilities of a text's last tokens; the others go into the cache at once, behind padding if any."""
    cache = subject.cache(LOADED.config, reserve=len(ids) + padding)
    tokens = torch.tensor([[LOADED.tokenizer.pad_token_id] * padding + list(ids)])
    mask = torch.tensor([[0] * padding + [1] * len(ids)])
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    context, last = slice(0, -LAST), slice(-LAST, None)
    for part, seen in ((context, mask[:, context]), (last, mask)):
        inputs = {"input_ids": tokens[:, part], "attention_mask": seen, "position_ids": places[:, part]}
        logits = MODEL(**inputs, past_key_values=cache).logits
    return logits[0].float().log_softmax(-1)


def divergence(expected: Tensor, found: Tensor) -> float:
    return kl_div(found, expected, log_target=True, reduction="batchmean").item()


@torch.inference_mode()
def requantized(layer: Any, prompt: int = 512, new: int = 1024) -> tuple[float, float]:
    torch.manual_seed(0)
    keys = torch.randn(1, 2, prompt, 64)
    layer.update(keys, keys)
    errors = []
    for _ in range(2):
        read = layer._dequantize(layer._quantized_keys)[:, :, :prompt]
        errors.append((read - keys).pow(2).mean().item())
        for _ in range(new if len(errors) == 1 else 0):
            layer.update(*torch.randn(2, 1, 2, 1, 64))
    return errors[0], errors[1]


def show(cell: Any) -> str:
    """Return three digits; a number with its interval where it has one."""
    if isinstance(cell, Estimate):
        return f"{cell.value:.3g} [{cell.low:.3g}, {cell.high:.3g}]"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


DEMONSTRATIONS = {
    each.__name__: each
    for each in (one_pass, first_token, windows, unequal_bytes, pairing, tokens_per_second, left_padding, requantizing)
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The measurements behind docs/footguns.md.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(DEMONSTRATIONS))
    parser.add_argument("--limit", type=int, default=10, help="samples")
    options = parser.parse_args()
    if unknown := set(options.names) - set(DEMONSTRATIONS):
        parser.error(f"no {', '.join(unknown)}; there are {', '.join(DEMONSTRATIONS)}")
    for name in options.names or DEMONSTRATIONS:
        table = DEMONSTRATIONS[name](options.limit)
        rows = [[show(cell) for cell in row] for row in table.rows]
        console.table(f"{name}: {table.title}", table.columns, rows)


if __name__ == "__main__":
    main()
