"""A recommendation in words, as tables, and as plain data for `--json`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

from ...errors import ExportError
from ...evaluation.grid import by_depth
from ...evaluation.results import Estimate, Table
from ...export import TARGETS
from ...export.target import OR_PLUGIN
from ...plan.sizes import format_bytes
from ...studies.recommend.cost import PROVEN, Forecast, PlannedStep
from ...studies.recommend.judge import FEWEST, Judgement, Outcome
from ...studies.recommend.study import MeasuredPlan, MeasuredTask, Recommendation
from ..comparison import ITSELF
from ..printable import one_line
from .dry_run import duration_text
from .evaluation import format_estimate
from .verdict import tokens

VERDICTS: dict[Outcome, str] = {
    "safe": "safe at {context}",
    "safe-up-to": "safe up to {safe}, not at {context}",
    "not-safe": "not safe at {context}",
    "not-proven": "not proven at {context}",
}
ENGINES = {"vLLM": "vllm", "llama.cpp": "llama.cpp"}
"""Other engines, and the names that `kvmix export` has for them."""
COLUMNS = ("task", "number", "plan", "unquantized")


class EvidenceRow(NamedTuple):
    """A number that was measured.

    Attributes:
        reference: the unquantized cache's number; None if it has none.
        depth: place in the context of the values that it is about, 0 for the beginning; None for all.
    """

    task: str
    metric: str
    own: Estimate
    reference: float | None
    unit: str = ""
    depth: float | None = None


def answer_text(found: Recommendation) -> str:
    """Return the verdict in one sentence, with the numbers that it rests on."""
    best = found.best
    name = f"{best.path.stem} at {best.plan.bits.stored:.3g} stored bits"
    if best.outcome == "not-safe":
        name = f"no plan passes, the nearest is {name}"
    said = "; ".join(_said(each, found) for each in best.judgements)
    is_partly_safe = best.outcome == "not-proven" and best.safe_context
    rest = f"; within {tokens(best.safe_context or 0)} its KL is" if is_partly_safe else ""
    return one_line(f"{_verdict(best, found)}: {name}: {said}{rest}")


def _said(judgement: Judgement, found: Recommendation) -> str:
    """Return what one judgement says, with its numbers and what they lack."""
    numbers, missing = _numbers(judgement, found), judgement.missing
    unclear = (
        "probably more than counts as safe, more text does not help"
        if missing is None
        else f"too little text to tell, about {missing} tokens of it are missing (--limit)"
    )
    words = {
        "within": numbers,
        "above": f"{numbers}: more than counts as safe",
        "unclear": f"{numbers}: {unclear}",
        "few documents": f"{numbers}, at {tokens(found.length)}: {FEWEST} documents of {tokens(found.context)} are "
        f"needed, and {missing} tokens are missing (a longer --text, or a larger --limit)",
        "few values": f"{numbers}: {missing} more values are needed (a larger --limit)",
        "no interval": f"{numbers}: without an interval it cannot be told",
        "nothing to lose": f"{numbers}, which says nothing",
        "nothing read": f"{judgement.task}: sink, window and page hold the whole context, nothing quantized was read",
        "not measured": f"{judgement.task} could not be measured: {judgement.error}",
    }
    return words[judgement.reason]


def _numbers(judgement: Judgement, found: Recommendation) -> str:
    if judgement.own is None:
        return judgement.metric
    own = format_estimate(judgement.own, "")
    if judgement.metric == "kl":
        return f"KL {own} nats a token of at most {found.limit:.3g}{_later(judgement, found)}"
    against = "" if judgement.reference is None else f" against {format_estimate(judgement.reference, '')}"
    return f"{judgement.metric.replace('_', ' ')} {own}{against}"


def _later(judgement: Judgement, found: Recommendation) -> str:
    """Return the part of the positions whose KL is above the limit where that of all positions is not."""
    own, part = judgement.own, judgement.part
    if own is None or part is None or not own.value <= found.limit < part["kl"].value:
        return ""
    return f", but {format_estimate(part['kl'], '')} from position {part['start']} to {part['stop'] - 1}"


def recommendation_tables(found: Recommendation) -> list[Table]:
    """Return the evidence, its details by position, and the plans that were compared before it."""
    best = found.best
    rows = [(row.task, _title(row), format_estimate(row.own, row.unit), _reference(row)) for row in evidence(found)]
    notes = [f"{each.task.name}: {each.report.description}" for each in best.measured]
    weights, cache, prompt = map(format_bytes, (found.weights, found.cache, found.activations))
    notes += [
        f"weights {weights}, cache {cache} at {tokens(found.context)}, activations of such a prompt about {prompt}"
    ]
    title = f"{best.path.stem} of {one_line(found.model.id)}"
    tables = [Table(title, COLUMNS, rows, "".join(f"{one_line(note)}\n" for note in notes))]
    tables += [table for each in best.measured for table in each.task.details([each.row])]
    return [*tables, _compared(found)]


def _compared(found: Recommendation) -> Table:
    """Return the plans that were compared on the first documents, and what all documents said of some."""
    verdicts = {each.plan.bits.stored: _verdict(each, found) for each in (*found.others, found.best)}
    rows = [(f"{bits:.2f}", f"{kl:.3g}", verdicts.get(bits, "-")) for bits, kl in found.compared.items()]
    head = ("stored bits", "KL on the first documents", "on all documents")
    return Table(
        "plans that were compared", head, rows, "".join(f"{_objection(each, found)}\n" for each in found.others)
    )


def _objection(measured: MeasuredPlan, found: Recommendation) -> str:
    """Return what speaks against a plan that did not pass, with its numbers."""
    against = "; ".join(_said(each, found) for each in measured.judgements if not each.passed)
    return one_line(f"{measured.plan.bits.stored:.2f}: {against}")


def _verdict(measured: MeasuredPlan, found: Recommendation) -> str:
    return VERDICTS[measured.outcome].format(context=tokens(found.context), safe=tokens(measured.safe_context or 0))


def _title(row: EvidenceRow) -> str:
    name = row.metric.replace("_", " ")
    return name if row.depth is None else f"{name} at depth {row.depth:.0%}"


def _reference(row: EvidenceRow) -> str:
    return "-" if row.reference is None else format_estimate(Estimate.exact(row.reference), row.unit)


def evidence(found: Recommendation) -> list[EvidenceRow]:
    """Return all numbers that were measured of the recommended plan."""
    return [row for each in found.best.measured for row in _rows(each)]


def _rows(measured: MeasuredTask) -> Iterator[EvidenceRow]:
    task, row, reference = measured.task.name, measured.row, measured.report.reference
    for metric in measured.task.metrics:
        if metric.name in row.metrics:
            other = 0.0 if "increase" in metric.name else ITSELF.get(metric.name, reference.value(metric.name))
            yield EvidenceRow(task, metric.name, row.metrics[metric.name], other, metric.unit)
    others = by_depth(reference.records)
    depths = by_depth(row.records)
    for depth, estimate in depths.items() if len(depths) > 1 else ():
        yield EvidenceRow(task, task, estimate, others[depth].value if depth in others else None, depth=depth)


def commands(found: Recommendation) -> dict[str, str]:
    """Return, by engine, the command that uses the recommended plan, or the reason why there is none."""
    path = str(found.best.path)
    lines = {"transformers": shlex.join(["kvmix", "run", "--plan", path, "--prompt", "..."])}
    for engine, name in ENGINES.items():
        try:
            TARGETS[name].export(found.best.plan)
        except ExportError as error:
            reason = str(error).removeprefix(f"{engine} ").removeprefix(f"{name} ")
            lines[engine] = one_line(reason.removesuffix(OR_PLUGIN))  # which has a sentence of its own below
        else:
            lines[engine] = shlex.join(["kvmix", "export", path, "--to", name])
    if any(layer.is_coded for layer in found.best.plan.layers.values()):
        measure = shlex.join(["kvmix", "export", path, "--to", "vllm-plugin", "--measure", "--out", "engine.yaml"])
        lines["vLLM"] += f", or with our plugin, which has no window such as this proof rests on: `{measure}` first"
    return lines


def recommendation_json(found: Recommendation) -> dict[str, Any]:
    """Return a recommendation as `kvmix recommend --json` prints it."""
    best = found.best
    return {
        "command": "recommend",
        "model": found.model.id,
        "context": found.context,
        "verdict": best.outcome,
        "safe_context": best.safe_context,
        "plan": best.path,
        "stored_bits": best.plan.bits.stored,
        "nominal_bits": best.plan.bits.nominal,
        "cache_bytes": found.cache,
        "weights_bytes": found.weights,
        "activation_bytes": found.activations,
        "max_kl": found.limit,
        "text": answer_text(found),
        "missing_tokens": next((each.missing for each in best.judgements if each.metric == "kl"), None),
        "evidence": [_evidence_json(row) for row in evidence(found)],
        "compared": [{"stored_bits": bits, "kl": kl} for bits, kl in found.compared.items()],
        "commands": commands(found),
    }


def _evidence_json(row: EvidenceRow) -> dict[str, Any]:
    depth = {} if row.depth is None else {"depth": row.depth}
    return {"task": row.task, "metric": row.metric, **asdict(row.own), "reference": row.reference, **depth}


def forecast_table(found: Forecast) -> Table:
    """Return the steps of a recommendation with their times, which are estimates, and what these rest on."""
    rows = [(step.name, step.what, duration_text(step.seconds), _range_text(step)) for step in found.steps]
    unknown = any(step.seconds is None for step in found.steps)
    notes = [] if unknown and not found.seconds else _total(found)
    notes += [f"about {format_bytes(found.memory)} of memory for weights and two caches", found.basis]
    title = f"what a recommendation for {one_line(found.model.id)} at {tokens(found.context)} would do"
    return Table(title, ("step", "what", "about", "from - to"), rows, "".join(f"{note}\n" for note in notes))


def _total(found: Forecast) -> list[str]:
    """Return the time of all steps, and what it depends on."""
    shortest, longest = map(duration_text, found.range)
    total = f"about {duration_text(found.seconds)} in all, from {shortest} to {longest}: that depends on how many plans"
    lines = [f"{total} have to be measured; samples that are kept already are not counted off"]
    if found.per_proof:
        each = duration_text(found.per_proof)
        lines += [f"should more than {PROVEN.most} have to be proven, each takes up to {each}"]
    return lines


def _range_text(step: PlannedStep) -> str:
    """Return the shortest and the longest time of a step whose time depends on what is found, `60 s - 3 min`."""
    return " - ".join(map(duration_text, step.range)) if step.each else ""


def forecast_json(found: Forecast) -> dict[str, Any]:
    """Return a forecast as `kvmix recommend --dry-run --json` prints it."""
    return {
        "command": "recommend",
        "model": found.model.id,
        "context": found.context,
        "dry_run": True,
        "steps": [_planned_json(step) for step in found.steps],
        "seconds": found.seconds,
        "seconds_range": found.range,
        "seconds_per_proof": found.per_proof,
        "memory_bytes": found.memory,
        "basis": found.basis,
    }


def _planned_json(step: PlannedStep) -> dict[str, Any]:
    about = {"name": step.name, "what": step.what, "seconds": step.seconds}
    return {**about, "seconds_range": None if step.seconds is None else step.range}
