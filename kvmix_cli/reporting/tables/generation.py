"""A generated text's speed and the bytes of its cache, as a table and as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...evaluation.results import Table

if TYPE_CHECKING:
    from ...decoding.footprint import Footprint, FullContext
    from ...decoding.generate import Generation
    from ...decoding.prompt_cache import PromptFiles

MIB = 2**20


def generation_table(
    plan: str, generation: Generation, footprint: Footprint, whole: FullContext | None, files: PromptFiles
) -> Table:
    """Return speed and bytes; for a context that is shorter than the model's limit, also the bytes at that limit."""
    decode = generation.decode_tokens_per_s
    rows = [
        ("prompt", f"{generation.prompt_tokens - generation.reused_tokens}", f"{generation.prompt_tokens_per_s:.1f}"),
        ("decode", f"{generation.new_tokens - 1}", "-" if decode is None else f"{decode:.1f}"),
    ]
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
    return Table(f"run with {plan}", ("", "tokens", "tokens/s"), rows, "\n".join(lines))


def generation_json(
    model: str, plan: str, generation: Generation, footprint: Footprint, whole: FullContext | None
) -> dict[str, Any]:
    """Return what `kvmix run --json` prints of a text."""
    return {
        "command": "run",
        "model": model,
        "plan": plan,
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
