"""The memory that a model needs, as tables and as plain data."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from ...evaluation.results import Table
from ...plan.sizes import format_bytes
from ...studies.fit.answer import FitAnswer, FitRow, widest
from ...studies.fit.formats import PlanFormat
from ...studies.fit.roofline import USABLE, GpuGroup


def fit_tables(found: FitAnswer) -> list[Table]:
    """Return a table of all formats, and one of the cache by kind of layer if there are several."""
    question = found.question
    sequences = "" if question.batch == 1 else f" x {question.batch} sequences"
    title = f"memory of {found.facts.info.id} at {question.context} tokens{sequences}"
    columns = ["cache", "nominal", "stored", "bytes", "smaller", "with weights"]
    if question.memory is not None:
        columns += [f"in {format_bytes(question.memory)}", "max context", "max batch"]
    full = found.rows[0].cache_bytes
    rows = [_cells(row, full, question.memory) for row in found.rows]
    tables = [Table(title, columns, rows, "\n".join(_footer(found)) + "\n")]
    if question.gpus is not None:
        tables.append(_gpu_table(found, question.gpus))
    kinds = list(found.rows[0].by_kind)
    if len(kinds) > 1:
        shown = [row for row in found.rows if row.format is found.rows[0].format or isinstance(row.format, PlanFormat)]
        counts = Counter(layer.kind for layer in found.facts.layers)
        by_kind = [[kind, f"{counts[kind]}", *(format_bytes(row.by_kind[kind]) for row in shown)] for kind in kinds]
        names = [row.format.name for row in shown]
        tables.append(Table("cache by kind of layer", ["kind", "layers", *names], by_kind, ""))
    return tables


def _cells(row: FitRow, full: int, memory: int | None) -> list[str]:
    nominal, stored = (f"{bits:.4g}" for bits in row.format.bits)
    if row.fault is not None:
        return [row.format.name, nominal, stored, f"no: {row.fault}", *["-"] * (2 if memory is None else 5)]
    cells = [row.format.name, nominal, stored, format_bytes(row.cache_bytes)]
    cells += [f"{full / row.cache_bytes:.2f}x" if row.cache_bytes else "-", format_bytes(row.total_bytes)]
    if memory is not None:
        cells += ["fits" if row.fits(memory) else "no", f"{row.max_context}", f"{row.max_batch}"]
    return cells


def _gpu_table(found: FitAnswer, gpus: GpuGroup) -> Table:
    """Return the memory of one GPU, and the speed of all."""
    question = found.question
    columns = ["cache", "stored", "bytes a GPU", "with weights", "fits", "max context", "max batch"]
    columns += ["ms a step", "tokens/s", "at max batch", "waits for"]
    rows = []
    for row in found.rows:
        on = row.on_gpus
        if on is None:
            continue
        fastest = "-" if on.max_tokens_per_s is None else f"{on.max_tokens_per_s:.0f}"
        cells = [
            row.format.name,
            f"{row.format.bits[1]:.4g}",
            format_bytes(on.cache_bytes),
            format_bytes(on.total_bytes),
        ]
        cells += ["fits" if on.fits else "no", f"{on.max_context}", f"{on.max_batch}"]
        rows.append([*cells, f"{1000 * on.step_seconds:.3g}", f"{on.tokens_per_s:.0f}", fastest, on.bound])
    copies = {gpus.copies(layer.heads) for layer in found.facts.layers if layer.heads is not None}
    repeated = f"each KV head is on {max(copies)} GPUs\n" if copies and max(copies) > 1 else ""
    prompt = next((row.on_gpus.prefill_seconds for row in found.rows if row.on_gpus is not None), 0.0)
    footer = (
        f"{repeated}a bound, not a forecast: everything is read once at {gpus.gpu.bandwidth / 1e12:.3g} TB/s, of "
        f"{USABLE:.0%} of {gpus.gpu.memory / 1e9:.0f} GB; docs/scale.md\n"
        f"prompt:  {question.context} tokens take at least {prompt:.3g} s\n"
    )
    return Table(f"on {gpus.count} x {gpus.gpu.name}", columns, rows, footer)


def _footer(found: FitAnswer) -> list[str]:
    facts, question = found.facts, found.question
    prompt = "fed at once" if question.at_once is None else f"fed {question.at_once} tokens at a time"
    lines = [
        f"weights: {format_bytes(found.weights_bytes)}, from {facts.weights.source}",
        f"prompt:  its activations take about {format_bytes(found.rows[0].activation_bytes)}, {prompt}; included",
        f"layers:  {layers_text(found)}",
        "formats: unquantized is transformers' own cache; blocks as of vLLM 0.32.0 and llama.cpp",
    ]
    if any(layer.state is None for layer in facts.layers):
        lines.append("not in:  the recurrent states of this family, whose sizes are not known here; they do not grow")
    if question.memory is not None and found.left is not None:
        lines.append(f"room:    {_room(found)}")
    return lines


def layers_text(found: FitAnswer) -> str:
    """Return `6 full (2 x 64), 18 sliding (2 x 64, 511 tokens)`: layers by kind, with their heads."""
    counts = Counter((layer.kind, layer.heads, layer.window) for layer in found.facts.layers)
    parts = []
    for (kind, heads, window), count in counts.items():
        inside = [f"{heads}"] if heads is not None else []
        inside += [f"{window} tokens"] if window is not None else []
        parts.append(f"{count} {kind}" + (f" ({', '.join(inside)})" if inside else ""))
    return ", ".join(parts)


def _room(found: FitAnswer) -> str:
    """Return what the memory leaves for the cache, and which plan uses it."""
    question, bits = found.question, found.needed_bits
    if found.left is None or found.left <= 0 or bits is None:
        return "none is left for keys and values: a shorter context, a smaller batch, or --prefill-chunk"
    best = widest(found.rows, question.memory)
    which = f"{best.format.name} is the widest of these plans that fits" if best else "none of these plans fits"
    at = f"--memory {found.left} --context {question.context}"
    at += "" if question.batch == 1 else f" --batch {question.batch}"
    return (
        f"{format_bytes(found.left)}, {bits:.3g} bits for each element of keys and values; {which}\n"
        f"plan:    kvmix allocate {at}"
    )


def fit_json(found: FitAnswer) -> dict[str, Any]:
    """Return the memory of all formats as plain data."""
    facts, question = found.facts, found.question
    return {
        "model": facts.info.id,
        "context": question.context,
        "batch": question.batch,
        "memory": question.memory,
        "weights_bytes": found.weights_bytes,
        "weights": {"source": facts.weights.source, "parameters": facts.weights.parameters},
        "max_length": facts.max_length,
        "layers": dict(Counter(layer.kind for layer in facts.layers)),
        "needed_bits": found.needed_bits,
        "gpu": None if question.gpus is None else {"name": question.gpus.key, "tp": question.gpus.count},
        "rows": [_row_json(row, question.memory) for row in found.rows],
    }


def _row_json(row: FitRow, memory: int | None) -> dict[str, Any]:
    nominal, stored = row.format.bits
    head = {"plan": row.format.name, "engine": row.format.engine, "nominal_bits": nominal, "stored_bits": stored}
    if row.fault is not None:
        return {**head, "error": row.fault}
    return {
        **head,
        "cache_bytes": row.cache_bytes,
        "cache_bytes_by_kind": row.by_kind,
        "activation_bytes": row.activation_bytes,
        "total_bytes": row.total_bytes,
        "fits": row.fits(memory),
        "max_context": row.max_context,
        "max_batch": row.max_batch,
        "gpu": None if row.on_gpus is None else asdict(row.on_gpus),
    }
