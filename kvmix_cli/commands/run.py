"""`kvmix run`: generate with the quantized cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..errors import TextError
from . import options

if TYPE_CHECKING:
    from ..decoding.footprint import Footprint
    from ..decoding.generate import Generation

MIB = 2**20


def run(
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What to continue.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Read the prompt from a file, or from stdin with '-'.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(metavar="T", help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(metavar="P", help="Sample from this share of the probability.")] = 1.0,
    plan: Annotated[
        str | None,
        typer.Option(metavar="PLAN", help="File, name or short form of a plan [default: the newest], or PLAN+PRESET."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A published method instead, such as mikv or kvtuner:FILE.")
    ] = None,
    uniform: Annotated[int | None, typer.Option(metavar="BITS", help="The same width everywhere instead.")] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="The unquantized cache instead.")] = False,
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    seed: options.Seed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    profiles_dir: options.ProfilesDir = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Generate with the quantized cache; then say how fast it was and what the cache took."""
    text = _read_prompt(prompt, prompt_file)
    _check_choice(plan, preset, uniform, baseline)
    from ..cache.subject import UNQUANTIZED, Subject
    from ..decoding.footprint import measure_footprint
    from ..decoding.generate import generate, room
    from ..decoding.settings import reserve
    from ..models.loading import load_info, load_model
    from ..studies.selection import choose
    from ..texts.chat import chat_ids, prompt_ids

    need_plan = not (baseline or preset) and uniform is None
    choice = choose(
        [plan] if plan else [], [preset] if preset else [], model=model, revision=revision, need_plan=need_plan
    )
    source: dict[str, Any] = {"revision": choice.revision, "trust_remote_code": trust_remote_code}
    name, chosen = UNQUANTIZED, None
    if not baseline:
        plans = choice.plans(load_info(choice.model, **source), [] if uniform is None else [uniform])
        name, chosen = list(plans.items())[-1]
    loaded = load_model(choice.model, dtype=dtype, device=device, **source)
    ids = chat_ids(loaded.tokenizer, text, loaded.info.id) if chat else prompt_ids(loaded.tokenizer, text)
    allowed = min(max_new_tokens, room(len(ids), loaded.max_length))
    if allowed < max_new_tokens:
        console.notice(f"at most {allowed} new tokens: the model's limit is {loaded.max_length}, prompt included")
    cache = Subject(name, chosen).cache(loaded.config, reserve=reserve(len(ids), allowed))
    generation = generate(
        loaded,
        ids,
        cache,
        max_new_tokens=allowed,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        on_text=console.text,
    )
    console.text("\n\n")
    footprint = measure_footprint(cache, chosen, loaded.model.dtype.itemsize)
    _show(name, generation, footprint, quantized=chosen is not None)
    console.emit_json(_as_json(loaded.info.id, name, generation, footprint))


def _check_choice(plan: str | None, preset: str | None, uniform: int | None, baseline: bool) -> None:
    """Raise typer.BadParameter for two caches at once."""
    if baseline and uniform is not None:
        raise typer.BadParameter("choose one of --baseline and --uniform")
    if preset and plan:
        raise typer.BadParameter("choose one of --plan and --preset, or put them together: --plan PLAN+PRESET")
    if preset and (baseline or uniform is not None):
        raise typer.BadParameter(f"choose one of --preset and {'--baseline' if baseline else '--uniform'}")


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt's text. Raises KvmixError if it is empty or cannot be read."""
    if (prompt is None) == (prompt_file is None):
        raise typer.BadParameter("give the prompt with --prompt or with --prompt-file, one of them")
    if prompt_file is not None:
        try:
            prompt = sys.stdin.read() if prompt_file == "-" else Path(prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise TextError(f"cannot read the prompt from {prompt_file}: {reason}") from error
    if not prompt or not prompt.strip():
        raise TextError("the prompt is empty; give some text with --prompt or --prompt-file")
    return prompt


def _show(name: str, generation: Generation, footprint: Footprint, *, quantized: bool) -> None:
    decode = generation.decode_tokens_per_s
    console.table(
        f"run with {name}",
        ("", "tokens", "tokens/s"),
        [
            ("prompt", generation.prompt_tokens, f"{generation.prompt_tokens_per_s:.1f}"),
            ("decode", generation.new_tokens - 1, "-" if decode is None else f"{decode:.1f}"),
        ],
        f"cache {footprint.bytes / MIB:.2f} MiB; unquantized {footprint.unquantized_bytes / MIB:.2f} MiB, "
        f"in bf16 {footprint.bf16_bytes / MIB:.2f} MiB: compression {footprint.compression:.2f}x\n"
        f"{footprint.quantized_share:.1%} of what attention read was quantized",
    )
    if footprint.quantized_share == 0 and quantized:
        console.alert("nothing was quantized: sink, window and page held all tokens; this was the unquantized model")


def _as_json(model: str, name: str, generation: Generation, footprint: Footprint) -> dict[str, Any]:
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
        "quantized_share": footprint.quantized_share,
    }
