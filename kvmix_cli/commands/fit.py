"""`kvmix fit MODEL`: the memory that a model needs for a context, or what a memory holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from .. import console
from ..errors import ModelError, did_you_mean
from .options import ENCODE_ALONE, CommonOptions, Encoding, ModelOptions, ProfilesDir, expand, refuse
from .values import count_option, parse_bytes, parse_dtype, parse_model_dtype, parse_number, parse_width

WEIGHT_NAMES = {"fp8": "float8", "q8": "int8", "q4": "int4", "4bit": "int4", "8bit": "int8"}
"""Other names of the dtypes of weights."""


def _parse_weights_dtype(text: str) -> str:
    """Return the name of a dtype that weights can be counted in. Raises ModelError."""
    from ..models.weights import WEIGHT_BITS

    dtype = WEIGHT_NAMES.get(text.strip().lower(), parse_dtype(text))
    if dtype not in WEIGHT_BITS:
        known = ", ".join(WEIGHT_BITS)
        raise ModelError(f"unknown dtype of weights '{text}'{did_you_mean(text, WEIGHT_BITS)}: use {known}")
    return dtype


@dataclass(frozen=True)
class FitOptions:
    """The use that memory is counted for, and the plans that store the cache."""

    context: Annotated[Any, count_option("Tokens in the cache [default: 32K, or the model's limit].", least=1)] = None
    batch: Annotated[int, count_option("Sequences.")] = 1
    memory: Annotated[
        Any,
        typer.Option(metavar="SIZE", parser=parse_bytes, help="Memory that there is: what fits, and up to what size."),
    ] = None
    plan: Annotated[
        list[str] | None,
        typer.Option(metavar="PLAN", help="File, name or short form '0-3:k4v4,...', or PLAN+PRESET; repeatable."),
    ] = None
    preset: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A published method, such as mikv; repeatable.")
    ] = None
    uniform: Annotated[
        list[int] | None,
        typer.Option(
            metavar="BITS",
            parser=parse_width,
            help="The same width everywhere; repeatable [default: 8, 4, 3 and 2].",
        ),
    ] = None
    avg_bits: Annotated[
        list[float] | None,
        typer.Option(metavar="BITS", parser=parse_number, help="A mean of nominal bits, by two widths; repeatable."),
    ] = None
    encode: Encoding = None
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            parser=parse_model_dtype,
            help="Data type of the model: auto (the configuration's), float32, bfloat16 or float16.",
        ),
    ] = "auto"
    weights_dtype: Annotated[
        Any,
        typer.Option(
            metavar="DTYPE",
            parser=_parse_weights_dtype,
            help="Data type of the weights alone: float32, bfloat16, float16, float8, int8, int4 [default: as stored].",
        ),
    ] = None
    prefill_chunk: Annotated[Any, count_option("Tokens of a prompt that are fed at once [default: all].", least=1)] = (
        None
    )
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What GPUs hold, and how fast they decode at most: h100, b200, mi300x, ..."),
    ] = None
    tp: Annotated[
        Any, count_option("GPUs that share the model's heads (tensor parallelism) [default: 1].", least=1)
    ] = None
    images: Annotated[int, count_option("Images, for a model that attends to them apart (Mllama).", least=0)] = 0
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False
    profiles_dir: ProfilesDir = None

    def __post_init__(self) -> None:
        """Raise typer.BadParameter for an encoder without a width, which changes no byte, and for GPUs of no name."""
        if self.encode and not self.uniform:
            raise typer.BadParameter(ENCODE_ALONE)
        if self.gpu is None:
            refuse({"tp": self.tp}, "needs --gpu")
        else:
            refuse({"memory": self.memory}, "does not go with --gpu, whose memory is known")


@expand
def fit(which: ModelOptions, what: FitOptions, common: CommonOptions) -> None:
    """Count the memory that a model needs: weights, activations and cache, without loading it.

    With --memory: what fits, the longest context, the largest batch, and the bits that are needed. With --gpu: the
    same on each of --tp GPUs, and the most tokens a second that their bandwidth allows.
    """
    from ..studies.fit.answer import FitQuestion, answer, average_plan, usual_context, usual_plans
    from ..studies.fit.facts import ELEMENT_BYTES, read_facts
    from ..studies.fit.gpus import GPUS
    from ..studies.fit.roofline import GpuGroup
    from ..studies.selection import check_widths, choose

    gpus = None if what.gpu is None else GpuGroup(what.gpu.lower(), GPUS[what.gpu.lower()], what.tp or 1)
    check_widths(what.uniform or [])
    choice = choose(
        what.plan or [],
        what.preset or [],
        model=which.model,
        revision=which.revision,
        need_plan=False,
        say=console.notice,
    )
    facts = read_facts(choice.model, choice.revision, trust_remote_code=what.trust_remote_code)
    if facts.needed_torch is not None:
        console.notice(f"torch was loaded, which takes a while: it is needed for {facts.needed_torch}")
    plans = choice.plans(facts.info, what.uniform or [], console.notice, encode=what.encode)
    plans |= {f"avg-{bits:g}": average_plan(facts.info, bits) for bits in what.avg_bits or []}
    question = FitQuestion(
        context=usual_context(facts, what.context),
        batch=what.batch,
        memory=what.memory,
        element_bytes=ELEMENT_BYTES[what.dtype] if what.dtype != "auto" else facts.element_bytes,
        weights_dtype=what.weights_dtype or (None if what.dtype == "auto" else what.dtype),
        at_once=what.prefill_chunk,
        images=what.images,
        gpus=gpus,
    )
    found = answer(facts, plans or usual_plans(facts.info), question)
    from ..reporting.tables.fit import fit_json, fit_tables

    for table in fit_tables(found):
        console.table(*table)
    console.emit_json({"command": "fit", **fit_json(found)})
