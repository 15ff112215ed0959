"""Presses of kvpress beside plans of the same bytes: what the model predicts, and what it recalls.

    python examples/presses.py builtin:tiny --plan transform-stored-2.35 --uniform 4 [--task perplexity,recall]

Each press compresses a transformers `DynamicCache` as kvpress itself does, after the prompt, to the share of the tokens
that takes as many bytes in 16 bits as each plan's cache of that prompt: sink, window and waiting tokens included, in
16 bits, too. Text and questions that come later are read through the compressed cache, which keeps all of them.

kvpress wants an older transformers: install it with `pip install --no-deps kvpress==0.5.5 cachetools fire termcolor`.
Newer attentions are not told the places of their tokens, which kvpress reads; `driven` tells them.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from kvmix_cli.cache import register
from kvmix_cli.cache.subject import Subject
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.results import Estimate, Report
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.evaluation.tasks.perplexity import Perplexity
from kvmix_cli.evaluation.tasks.recall import Recall
from kvmix_cli.models.loading import load_model
from kvmix_cli.plan import Plan
from kvmix_cli.studies.selection import choose

PRESSES = ("SnapKV", "KeyDiff", "ExpectedAttention", "TOVA", "StreamingLLM", "Knorm", "KVzip")
TASKS = {"perplexity": Perplexity, "recall": Recall}
METRICS = {"perplexity": ("kl", "kl_p99", "same_token"), "recall": ("recalled",)}
FULL_BITS = 16


class PressedCache(DynamicCache):
    """A `DynamicCache` whose prompt a press compresses; later tokens keep the places that they have in the text.

    Attributes:
        press: called with the model, it compresses what is read meanwhile.
        dropped: tokens of the prompt that each layer has not kept.
        masked: by layer, places that a press masks instead of dropping them (batch row, head, token).
    """

    def __init__(self, press: Any, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.press = press
        self.dropped = 0
        self.masked: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens that were read, dropped ones included."""
        return int(super().get_seq_length(layer_idx)) + self.dropped

    def note(self, tokens: int, model: nn.Module) -> None:
        """Note what the press has left of a prompt of so many tokens."""
        self.dropped = tokens - int(super().get_seq_length())
        places = {module.layer_idx: getattr(module, "masked_key_indices", None) for module in attentions(model)}
        self.masked = {layer: each for layer, each in places.items() if each is not None}

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Return the length and offset of keys in a mask: those that are kept come right before the new ones."""
        length, offset = super().get_mask_sizes(*args, **kwargs)
        return length, offset + self.dropped


@dataclass(frozen=True)
class Pressed:
    """A press as a baseline of an evaluation.

    Attributes:
        kind: name of the press, without "Press".
        kept: share of the prompt's tokens that it keeps.
    """

    kind: str
    kept: float

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.stored_bits:.2f}"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"kind": self.kind, "kept": self.kept}

    @property
    def nominal_bits(self) -> float:
        return FULL_BITS * self.kept

    @property
    def stored_bits(self) -> float:
        return FULL_BITS * self.kept

    def cache(self, config: PreTrainedConfig) -> PressedCache:
        """Return an empty cache."""
        kvpress: Any = importlib.import_module("kvpress")
        return PressedCache(getattr(kvpress, f"{self.kind}Press")(compression_ratio=1 - self.kept), config)


@contextmanager
def driven(model: nn.Module) -> Iterator[None]:
    """Within this block let each `PressedCache` be compressed after the first tokens that it is given, its prompt."""
    with ExitStack() as hooks, ExitStack() as reading:

        def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            cache = kwargs["past_key_values"]
            if isinstance(cache, PressedCache) and cache.get_seq_length() == 0:
                reading.callback(cache.note, kwargs["input_ids"].shape[1], model)  # once the press is done
                reading.enter_context(cache.press(model))

        def place(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            cache, index = kwargs["past_key_values"], module.layer_idx
            module.masked_key_indices = cache.masked.get(index) if isinstance(cache, PressedCache) else None
            if not isinstance(cache, PressedCache):
                return None
            held, new = cache.layers[index].get_seq_length(), kwargs["hidden_states"].shape[1]
            return args, {**kwargs, "cache_position": torch.arange(held, held + new)}

        hooks.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        hooks.callback(model.register_forward_hook(lambda *_: reading.close()).remove)
        for module in attentions(model):
            hooks.callback(module.register_forward_pre_hook(place, with_kwargs=True).remove)
        yield


def attentions(model: nn.Module) -> list[Any]:
    """Return the attention modules of a model of Llama's kind, which presses know."""
    return [module for module in model.modules() if hasattr(module, "q_proj")]


def of_equal_bytes(
    plans: Mapping[str, Plan], context: int, presses: Sequence[str] = PRESSES
) -> dict[str, list[Subject]]:
    """Return by plan the plan and presses of its bytes after a prompt of so many tokens."""
    return {
        name: [
            Subject(name, plan),
            *(Subject(f"{kind}, as {name}", baseline=Pressed(kind, kept_share(plan, context))) for kind in presses),
        ]
        for name, plan in plans.items()
    }


def kept_share(plan: Plan, context: int) -> float:
    """Return the share of a prompt's tokens that take in 16 bits the bytes of the plan's cache of all of them."""
    return plan.cache_bytes(context).total / plan.unquantized_bytes(context)


def table(report: Report, context: int, subjects: Mapping[str, Subject]) -> list[str]:
    """Return a report as a Markdown table, of bits of all that a prompt takes."""
    metrics = [name for name in METRICS[report.task] if name in report.plans[0].metrics]
    lines = [f"\n{report.description}\n", f"| cache | bits at {context} | {' | '.join(metrics)} |"]
    lines.append("|---" * (2 + len(metrics)) + "|")
    for row in report.rows:
        subject = subjects.get(row.plan, Subject())
        bits = FULL_BITS * kept_share(subject.plan, context) if subject.plan else subject.bits[1]
        values = [_shown(row.metrics.get(name)) for name in metrics] if row.error is None else [row.error]
        lines.append(f"| {row.plan} | {bits:.2f} | {' | '.join(values)} |")
    return lines


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.4g} [{estimate.low:.4g}, {estimate.high:.4g}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="hub id, local folder or builtin:tiny")
    parser.add_argument("--plan", action="append", default=[], help="file or name of a plan, or its short form")
    parser.add_argument("--uniform", action="append", default=[], type=int)
    parser.add_argument("--presses", default=",".join(PRESSES), help="names, separated by commas")
    parser.add_argument("--task", default="perplexity,recall")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--prefix", type=int, default=1536, help="tokens of a document that are the prompt")
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--text", default="builtin")
    options = parser.parse_args(arguments)
    register()
    loaded = load_model(options.model, dtype="float32")
    choice = choose(options.plan, model=options.model, revision=None, need_plan=False)
    plans = choice.plans(loaded.info, options.uniform)
    settings = Settings(length=options.length, prefix=options.prefix, limit=options.limit, text=options.text)
    for name in options.task.split(","):
        context = options.prefix if name == "perplexity" else options.length
        groups = of_equal_bytes(plans, context, options.presses.split(","))
        subjects = {each.name: each for group in groups.values() for each in group}
        with driven(loaded.model):
            report = run_task(TASKS[name](), loaded, [*subjects.values()], settings)
        print("\n".join(table(report, context, subjects)), flush=True)


if __name__ == "__main__":
    main()
