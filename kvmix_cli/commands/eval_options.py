"""Options of `kvmix eval`: what is measured and on what, options of single tasks, and those of a leaderboard."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import EvaluationError
from .dry_run import DryRunFlag
from .options import ENCODE_ALONE, Encoding, given
from .ranks import TensorParallel
from .values import (
    count_option,
    parse_batch,
    parse_budgets,
    parse_bytes,
    parse_count,
    parse_counts,
    parse_groups,
    parse_names,
    parse_width,
)

PROMPTS = "Tasks that generate: LongBench and lm-eval"
SWEEPS = "Sweeps: throughput, recall and needles"
BOARD = "Leaderboard"


def _parse_length(text: str) -> int | tuple[int, ...]:
    """Return a length, or the lengths of a list, `4K,16K`."""
    return parse_counts(text) if "," in text else parse_count(text)


@dataclass(frozen=True)
class EvalOptions:
    """The subjects to measure, the text to measure them on, and the folder of the results."""

    task: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="perplexity [the default], long-context (recall, passkey, kv_retrieval, multi_hop, code_completion), "
            "memory, throughput, longbench[:NAME,...], longbench-e, longctx_bench, or any task of lm-eval.",
        ),
    ] = None
    plan: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLAN",
            help="File, name or short form '0-3:k4v4,...' [default: the newest], or PLAN+PRESET; repeatable.",
        ),
    ] = None
    preset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A published method, such as mikv or kvtuner:FILE, without a plan; repeatable."
        ),
    ] = None
    uniform: Annotated[
        list[int] | None,
        typer.Option(metavar="BITS", parser=parse_width, help="The same width everywhere; repeatable."),
    ] = None
    encode: Encoding = None
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Another project's cache to compare with: bf16, fp8, hf-fp8, hf-quanto-{2,4}, hf-hqq-{1,2,3,4,8}, or "
            "all of these; uniform-N, random-plan[-SEED]; repeatable.",
        ),
    ] = None
    length: Annotated[
        Any,
        typer.Option(
            metavar="N", parser=_parse_length, help="Tokens of a document or context; several for tasks of --contexts."
        ),
    ] = "1024"
    prefix: Annotated[
        int, count_option("Tokens of these that are prefilled before scoring (perplexity).", least=None)
    ] = 256
    step: Annotated[int, count_option("Tokens fed at a time; 1 is exact decoding.", least=None)] = 32
    prefill_chunk: Annotated[
        int | None, count_option("Tokens prefilled at a time, each packed before the next [default: all].", least=None)
    ] = None
    text: Annotated[
        str,
        typer.Option(metavar="SOURCE", help="builtin (held out), wikitext2, c4, a file, a folder or hub:DATASET."),
    ] = "builtin"
    limit: Annotated[int | None, count_option("Most samples [default: the task's].", least=None)] = None
    output_dir: Annotated[Path, typer.Option(metavar="DIR", help="Where every sample is kept.")] = Path("results")
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted evaluation.")] = False
    join: Annotated[
        bool,
        typer.Option("--join", help="Share the rows with other processes of this command; implies --resume."),
    ] = False
    dry_run: DryRunFlag = False
    tensor_parallel: TensorParallel = False
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GATE", help="Exit with 3 if it holds, such as 'perplexity>+1%' or 'recall<0.8'; repeatable."
        ),
    ] = None

    def __post_init__(self) -> None:
        """Raise EvaluationError for a number out of its range."""
        for name in ("length", "prefix", "step", "limit", "prefill_chunk"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise EvaluationError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.encode and not self.uniform:
            raise EvaluationError(ENCODE_ALONE)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return all lengths, ascending."""
        return self.length if isinstance(self.length, tuple) else (self.length,)

    @property
    def of_plans(self) -> dict[str, Any]:
        """Return the options that name what is measured, and the gates that judge it."""
        names = ("plan", "preset", "uniform", "encode", "baseline", "fail_if")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class TaskOptions:
    """Options of single tasks; each is refused where no task has it."""

    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", rich_help_panel=PROMPTS, help="LongBench's JSONL files [default: from the hub]."),
    ] = None
    max_length: Annotated[
        int | None, count_option("Most tokens of a prompt [default: the model's limit].", rich_help_panel=PROMPTS)
    ] = None
    strict: Annotated[
        bool, typer.Option("--strict", rich_help_panel=PROMPTS, help="A malformed line is an error, not skipped.")
    ] = False
    batch_size: Annotated[
        Any,
        typer.Option(metavar="N", parser=parse_batch, rich_help_panel=PROMPTS, help="Prompts at a time, or auto."),
    ] = None
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", rich_help_panel=PROMPTS, help="Task files of your own, for lm-eval.")
    ] = None
    num_fewshot: Annotated[
        int | None, count_option("Examples in a prompt of lm-eval.", least=0, rich_help_panel=PROMPTS)
    ] = None
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", rich_help_panel=PROMPTS, help="Also for tasks of lm-eval.")
    ] = False
    contexts: Annotated[
        Any,
        typer.Option(
            metavar="LIST",
            parser=parse_counts,
            rich_help_panel=SWEEPS,
            help="Tokens of contexts, e.g. 1024,4096 [default: --length].",
        ),
    ] = None
    batches: Annotated[
        Any,
        typer.Option(
            metavar="LIST",
            parser=parse_counts,
            rich_help_panel=SWEEPS,
            help="Sequences at a time (throughput) [default: 1,8].",
        ),
    ] = None
    new_tokens: Annotated[
        int | None, count_option("Tokens to decode (throughput) [default: 32].", least=2, rich_help_panel=SWEEPS)
    ] = None
    repeats: Annotated[
        int | None, count_option("Times each point is measured (throughput) [default: 3].", rich_help_panel=SWEEPS)
    ] = None
    memory: Annotated[
        Any,
        typer.Option(
            metavar="SIZE",
            parser=parse_bytes,
            rich_help_panel=SWEEPS,
            help="Also find the largest batch within it (throughput) [default: no search].",
        ),
    ] = None
    depths: Annotated[
        int | None,
        count_option("Places of a needle in its context [default: 10; recall: scattered].", rich_help_panel=SWEEPS),
    ] = None
    hops: Annotated[
        int | None,
        count_option("Names that a number is handed on to (multi_hop) [default: 2].", rich_help_panel=SWEEPS),
    ] = None


@dataclass(frozen=True)
class BoardOptions:
    """Options of a leaderboard, which are refused without one."""

    leaderboard: Annotated[
        bool, typer.Option("--leaderboard", rich_help_panel=BOARD, help="Compare methods instead of plans of your own.")
    ] = False
    systems: Annotated[
        bool,
        typer.Option(
            "--systems", rich_help_panel=BOARD, help="Compare published methods; some of them with --preset NAME."
        ),
    ] = False
    stored_bits: Annotated[
        Any,
        typer.Option(
            metavar="LIST",
            parser=parse_budgets,
            rich_help_panel=BOARD,
            help="Budgets [default: 2.5,3,3.5,4; of --systems 2,2.5,3,4].",
        ),
    ] = None
    scores: Annotated[
        Any, typer.Option(metavar="LIST", parser=parse_names, rich_help_panel=BOARD, help="Scores [default: all].")
    ] = None
    methods: Annotated[
        Any, typer.Option(metavar="LIST", parser=parse_names, rich_help_panel=BOARD, help="Solvers [default: all].")
    ] = None
    group_size: Annotated[
        Any,
        typer.Option(metavar="LIST", parser=parse_groups, rich_help_panel=BOARD, help="To choose from, e.g. 64,32."),
    ] = None
    random_plans: Annotated[
        int | None, count_option("Random plans a budget [default: 8].", least=0, rich_help_panel=BOARD)
    ] = None
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=BOARD, help="Profile to use [default: the newest]."),
    ] = None

    @property
    def rules(self) -> dict[str, Any]:
        """Return the options that were given, without `--leaderboard` and `--systems` themselves."""
        kinds = ("leaderboard", "systems")
        return given({name: value for name, value in asdict(self).items() if name not in kinds})

    @property
    def of_scores(self) -> dict[str, Any]:
        """Return the options of methods of allocation."""
        names = ("scores", "methods", "group_size", "random_plans")
        return {name: getattr(self, name) for name in names}
