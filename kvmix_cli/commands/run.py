"""`kvmix run`: generate with the quantized cache."""

from __future__ import annotations

import math
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from .. import console
from ..errors import KvmixError, TextError
from .options import CommonOptions, Encoding, LoadingOptions, ModelOptions, expand, refuse
from .values import count_option, parse_number, parse_width

if TYPE_CHECKING:
    from torch import Tensor

    from ..decoding.footprint import Footprint, FullContext
    from ..decoding.generate import Generation
    from ..decoding.prompt_cache import PromptFiles
    from ..models.loading import LoadedModel

MIB = 2**20
MAX_PROMPT = 64 * MIB
"""Bytes of a prompt that are read at all; the model's context is the limit once the model is loaded."""


@dataclass(frozen=True)
class PromptOptions:
    """The prompt, and how it is continued."""

    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What to continue.")] = None
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Read the prompt from a file, or from stdin with '-'.")
    ] = None
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", metavar="FILE", help="An image before the prompt, in a chat template; repeatable."),
    ] = None
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False
    max_new_tokens: Annotated[int, count_option("Most tokens to generate.")] = 256
    temperature: Annotated[float, typer.Option(metavar="T", parser=parse_number, help="0 is greedy.")] = 0.0
    top_p: Annotated[
        float, typer.Option(metavar="P", parser=parse_number, help="Sample from this share of the probability.")
    ] = 1.0

    def __post_init__(self) -> None:
        """Raise typer.BadParameter unless there is one prompt, and KvmixError for a setting out of its range."""
        if (self.prompt is None) == (self.prompt_file is None):
            raise typer.BadParameter("give the prompt with --prompt or with --prompt-file, one of them")
        if not 0 <= self.temperature < math.inf:
            raise KvmixError(f"--temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise KvmixError(f"--top-p must be more than 0 and at most 1, got {self.top_p}")

    @property
    def text(self) -> str:
        """Return the prompt's text. Raises TextError if it is empty or cannot be read."""
        text = self.prompt if self.prompt_file is None else _read(self.prompt_file)
        if not text or not text.strip():
            raise TextError("the prompt is empty; give some text with --prompt or --prompt-file")
        return text


@dataclass(frozen=True)
class CacheOptions:
    """The cache, of which there is one."""

    plan: Annotated[
        str | None,
        typer.Option(metavar="PLAN", help="File, name or short form of a plan [default: the newest], or PLAN+PRESET."),
    ] = None
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A published method instead, such as mikv or kvtuner:FILE.")
    ] = None
    uniform: Annotated[
        int | None, typer.Option(metavar="BITS", parser=parse_width, help="The same width everywhere instead.")
    ] = None
    encode: Encoding = None
    baseline: Annotated[bool, typer.Option("--baseline", help="The unquantized cache instead.")] = False

    def __post_init__(self) -> None:
        """Raise typer.BadParameter for two caches at once."""
        if self.baseline and self.uniform is not None:
            raise typer.BadParameter("choose one of --baseline and --uniform")
        if self.encode and self.uniform is None:
            raise typer.BadParameter("--encode is for --uniform; a plan file has `encode` in its cache section")
        if self.preset and self.plan:
            raise typer.BadParameter("choose one of --plan and --preset, or put them together: --plan PLAN+PRESET")
        if self.preset and (self.baseline or self.uniform is not None):
            other = "--baseline" if self.baseline else "--uniform"
            raise typer.BadParameter(f"choose one of --preset and {other}")


@dataclass(frozen=True)
class FillingOptions:
    """The way of the prompt into the cache: fed at once or in chunks, or from a file that a run saved."""

    prefill_chunk: Annotated[
        int | None, count_option("Tokens of the prompt fed at a time, each packed before the next [default: all].")
    ] = None
    save_cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the packed cache of the prompt in a file.")
    ] = None
    load_cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take the beginning of the prompt from such a file.")
    ] = None
    replace: Annotated[bool, typer.Option("--replace", help="Let --save-cache replace a file that is there.")] = False

    def __post_init__(self) -> None:
        """Raise KvmixError if a file would be replaced without consent, or cannot be written."""
        if self.save_cache is None:
            refuse({"replace": self.replace}, "is for --save-cache")
            return
        from ..files import check_writable

        check_writable(self.save_cache)
        if self.save_cache.exists() and not self.replace:
            raise KvmixError(f"--save-cache {self.save_cache}: the file is there; add --replace, or name another file")

    @property
    def of_files(self) -> dict[str, Any]:
        """Return the options that name a file."""
        return {"save_cache": self.save_cache, "load_cache": self.load_cache}


@expand
def run(
    prompt: PromptOptions,
    storage: CacheOptions,
    filling: FillingOptions,
    which: ModelOptions,
    loading: LoadingOptions,
    common: CommonOptions,
) -> None:
    """Generate with the quantized cache; then say how fast it was and what the cache took."""
    if storage.baseline:
        refuse(filling.of_files, "needs a plan: the unquantized cache is not packed")
    if prompt.image:
        refuse({**filling.of_files, "prefill_chunk": filling.prefill_chunk}, "is for prompts without images")
    text = prompt.text
    images = _images(prompt.image or [])
    from ..studies.selection import check_widths, choose

    uniform = [] if storage.uniform is None else [storage.uniform]
    check_widths(uniform)
    choice = choose(
        [storage.plan] if storage.plan else [],
        [storage.preset] if storage.preset else [],
        model=which.model,
        revision=which.revision,
        need_plan=not (storage.baseline or storage.preset or uniform),
        say=console.notice,
    )
    from ..cache.subject import Subject
    from ..decoding.footprint import full_context, measure_footprint
    from ..decoding.generate import generate, room
    from ..decoding.prompt_cache import PromptFiles
    from ..decoding.settings import reserve
    from ..models.loading import load_info
    from ..reporting.words import layers_json, layers_text

    subject = Subject()
    if not storage.baseline:
        info = load_info(choice.model, revision=choice.revision, trust_remote_code=loading.trust_remote_code)
        name, plan = list(choice.plans(info, uniform, console.notice, encode=storage.encode).items())[-1]
        subject = Subject(name, plan)
    files = PromptFiles(filling.load_cache, filling.save_cache)
    files.check(subject.plan)
    loaded = loading.load(choice.model, choice.revision, reads_images=bool(images))
    loaded = replace(loaded, prefill_chunk=filling.prefill_chunk)
    _check_length(loaded, text)
    ids, inputs = _prompt(loaded, text, images, chat=prompt.chat)
    allowed = min(prompt.max_new_tokens, room(len(ids), loaded.max_length))
    if allowed < prompt.max_new_tokens:
        console.notice(f"at most {allowed} new tokens: the model's limit is {loaded.max_length}, prompt included")
    cache = files.cache(subject, loaded, ids, reserve(len(ids), allowed))
    generation = generate(
        loaded,
        ids,
        cache,
        max_new_tokens=allowed,
        temperature=prompt.temperature,
        top_p=prompt.top_p,
        seed=loading.seed,
        on_text=console.text,
        inputs=inputs,
        on_prompt=files.saving(cache, loaded, ids),
    )
    console.text("\n" if common.quiet else "\n\n")
    footprint = measure_footprint(cache, subject.plan, loaded.model.dtype.itemsize)
    whole = full_context(subject.plan, loaded)
    if not common.quiet:
        _show(subject.name, generation, footprint, whole, files)
        if subject.plan is not None and (layers := layers_text(loaded.info, subject.plan)):
            console.notice(layers)
    if footprint.quantized_share == 0 and subject.plan is not None:
        console.alert("nothing was quantized: sink, window and page held all tokens; this was the unquantized model")
    more = {"layers": None if subject.plan is None else layers_json(loaded.info, subject.plan), **files.as_json()}
    console.emit_json(_as_json(loaded.info.id, subject.name, generation, footprint, whole) | more)


def _images(paths: Sequence[Path]) -> list[Any]:
    """Return the images of a prompt, read before any model is. Raises TextError."""
    if not paths:
        return []
    from ..texts.images import read_images  # which loads torch

    return read_images(paths)


def _prompt(
    loaded: LoadedModel, text: str, images: Sequence[Any], *, chat: bool
) -> tuple[list[int], Mapping[str, Tensor]]:
    """Return the prompt's ids, and what the model reads of images beside them. Raises TextError."""
    from ..texts.chat import chat_ids, prompt_ids
    from ..texts.images import image_prompt

    if images:
        return image_prompt(loaded.processor, text, images, loaded.info.id)
    return chat_ids(loaded.tokenizer, text, loaded.info.id) if chat else prompt_ids(loaded.tokenizer, text), {}


def _read(name: str) -> str:
    """Return the text of a file, or of stdin for `-`, without a byte-order mark. Raises TextError."""
    from ..texts.files import decoded

    try:
        if name == "-":
            data = b"" if sys.stdin is None else _read_at_most(sys.stdin.buffer, "stdin")
        else:
            mode = Path(name).stat().st_mode
            if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                raise TextError(f"cannot read the prompt from {name}: it is a device, not a file")
            with Path(name).open("rb") as file:
                data = _read_at_most(file, name)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TextError(f"cannot read the prompt from {name}: {reason}") from error
    return decoded(data, "stdin" if name == "-" else name)


def _read_at_most(file: BinaryIO, name: str) -> bytes:
    data = file.read(MAX_PROMPT + 1)
    if len(data) > MAX_PROMPT:
        raise TextError(f"the prompt in {name} has more than {MAX_PROMPT // MIB} MiB; shorten it")
    return data


def _check_length(loaded: LoadedModel, text: str) -> None:
    """Raise TextError for a text that the model cannot hold, whatever its tokens are."""
    if loaded.max_length is None:
        return
    longest = max(map(len, loaded.tokenizer.get_vocab()))
    if len(text) > loaded.max_length * longest:
        raise TextError(
            f"the prompt has {len(text)} characters; the model's limit of {loaded.max_length} tokens holds at most "
            f"{loaded.max_length * longest}: shorten it"
        )


def _show(
    name: str, generation: Generation, footprint: Footprint, whole: FullContext | None, files: PromptFiles
) -> None:
    """Show speed and bytes; for a context that is shorter than the model's limit, also the bytes at that limit."""
    decode = generation.decode_tokens_per_s
    lines = [
        f"cache {footprint.bytes / MIB:.2f} MiB instead of {footprint.unquantized_bytes / MIB:.2f} MiB in the model's "
        f"dtype: {footprint.compression_same_dtype:.2f}x smaller ({footprint.compression:.2f}x against bf16)",
        f"{footprint.quantized_share:.1%} of what attention read was quantized (a prompt reads itself before it is)",
    ]
    if whole is not None and generation.prompt_tokens + generation.new_tokens < whole.tokens:
        lines.append(
            f"at the model's full context of {whole.tokens} tokens: {whole.cache_bytes / MIB:.2f} MiB instead of "
            f"{whole.unquantized_bytes / MIB:.2f} MiB in the model's dtype, {whole.compression:.2f}x smaller"
        )
    if files.loaded is not None:
        lines.append(
            f"{files.loaded.reused_tokens} tokens of the prompt were in {files.loaded.file}, which holds "
            f"{files.loaded.tokens} ({files.loaded.bytes / MIB:.2f} MiB, loaded in {files.loaded.seconds:.2f} s)"
        )
    if files.saved is not None:
        lines.append(
            f"{files.saved.tokens} tokens of the prompt are saved in {files.saved.file}: {files.saved.bytes / MIB:.2f} "
            f"MiB, {files.saved.compression:.2f}x smaller than in bf16"
        )
    console.table(
        f"run with {name}",
        ("", "tokens", "tokens/s"),
        [
            ("prompt", generation.prompt_tokens - generation.reused_tokens, f"{generation.prompt_tokens_per_s:.1f}"),
            ("decode", generation.new_tokens - 1, "-" if decode is None else f"{decode:.1f}"),
        ],
        "\n".join(lines),
    )


def _as_json(
    model: str, name: str, generation: Generation, footprint: Footprint, whole: FullContext | None
) -> dict[str, Any]:
    return {
        "command": "run",
        "model": model,
        "plan": name,
        "text": generation.text,
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": generation.new_tokens,
        "max_new_tokens": generation.max_new_tokens,
        "prompt_tokens_per_s": generation.prompt_tokens_per_s,
        "decode_tokens_per_s": generation.decode_tokens_per_s,
        "cache_bytes": footprint.bytes,
        "unquantized_cache_bytes": footprint.unquantized_bytes,
        "bf16_cache_bytes": footprint.bf16_bytes,
        "compression": footprint.compression,
        "compression_same_dtype": footprint.compression_same_dtype,
        "quantized_share": footprint.quantized_share,
        "full_context": None
        if whole is None
        else {
            "tokens": whole.tokens,
            "cache_bytes": whole.cache_bytes,
            "unquantized_cache_bytes": whole.unquantized_bytes,
            "compression": whole.compression,
        },
    }
