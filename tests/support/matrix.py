"""What kvmix does with one architecture of transformers, built small and with random weights.

It is saved to a folder, loaded by kvmix's own loader, and goes through six checks: 16 bits equal to transformers'
cache, 4 bits close to that, and the four commands. Its `Outcome` has for each check `yes`, `-` if it was not reached,
or a reason in one line.
"""

import os
import re
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from commandline import kvmix
from shrinking import small_config
from transformers.cache_utils import Cache, DynamicCache

from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.decoding.feed import feed, prefill
from kvmix_cli.errors import KvmixError, first_sentence
from kvmix_cli.models.configuration import PARTS_OF_ENCODER_DECODERS
from kvmix_cli.models.loading import LoadedModel, load_model
from kvmix_cli.models.multimodal import find_loader
from kvmix_cli.models.sources import ASSETS
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.plan.windows import Recent

CHECKS = ("equal", "close", "profile", "allocate", "run", "eval")
WORKS, PART, REFUSED, NOT_BUILT, FAULT = "works", "in part", "refused", "not built", "fault"
KINDS = {
    WORKS: "all six checks pass",
    PART: "some checks pass, the others are refused in one line",
    REFUSED: "the model is refused in one line, before anything is measured",
    NOT_BUILT: "transformers does not build it here",
    FAULT: "a traceback, a crash, a hang, or other predictions without a word",
}
"""Classes of outcome."""
YES, NOT_REACHED = "yes", "-"
MOST_PARAMETERS = 130_000_000
EQUAL = 1e-3
"""Largest relative difference of logits, as in `kvmix_cli.models.attention`: rounding in float32 makes some 1e-6, a
wrong mask or position about 1. Only where two tokens are tied may a difference as small as this choose another."""
CLOSE = 0.5
"""Largest relative difference of logits at 4 bits. Those of two unrelated texts differ by 1.4."""
LONGEST_LINE = 300
"""Characters of a reason."""
SETTINGS = CacheSettings(page=16, sink=2, group_size=16, window=Recent(tokens=8))
PROMPT = "The cache keeps keys and values of every token that was read. " * 8
COMMANDS = {
    "profile": ("profile", "./model", "--samples", 1, "--seq-len", 96),
    "allocate": ("allocate", "--avg-bits", 3, "--group-size", 16, "--page", 16, "--window", "recent:16"),
    "run": ("run", "./model", "--prompt", PROMPT, "--max-new-tokens", 6),
    "eval": ("eval", "./model", "--length", 128, "--prefix", 64, "--limit", 1),
}
READS = (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""Errors of classes that do not run with one of transformers' own attentions."""


@dataclass
class Outcome:
    """What became of one architecture.

    Attributes:
        type: model type, as in config.json.
        name: class of the model, empty if it was not built.
        checks: by name, `yes`, `-` or a reason in one line.
        kind: class of outcome, one of `KINDS`.
        reason: the first reason, empty if all is well.
        layers: layers that a plan decides about, of how many: `2 of 4`.
        heads: KV heads by channels in these layers, such as `2 x 32`.
        note: what kvmix warned of on loading.
        seconds: time that it took.
    """

    type: str
    name: str = ""
    checks: dict[str, str] = field(default_factory=lambda: dict.fromkeys(CHECKS, NOT_REACHED))
    kind: str = FAULT
    reason: str = ""
    layers: str = ""
    heads: str = ""
    note: str = ""
    seconds: float = 0.0


class Wrong(Exception):
    """Predictions that differ where they should not."""


def examine(model_type: str) -> Outcome:
    """Return the outcome of one architecture, in a temporary working folder."""
    outcome, before = Outcome(model_type), Path.cwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(folder)
        try:
            _examine(outcome)
        finally:
            os.chdir(before)
    reasons = (text for text in outcome.checks.values() if text not in (YES, NOT_REACHED))
    outcome.reason = outcome.reason or next(reasons, "")
    return outcome


def _examine(outcome: Outcome) -> None:
    try:
        outcome.name = build(outcome.type, Path("model"))
    except Exception as error:  # noqa: BLE001 - a class of transformers may raise anything
        outcome.kind, outcome.reason = NOT_BUILT, f"{type(error).__name__}: {line_of(error)}"
        return
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = load_model("./model")
    except KvmixError as error:
        outcome.kind, outcome.reason = REFUSED, line_of(error)
        _check(outcome, "profile", lambda: _command("profile"))
        if outcome.checks["profile"] != outcome.reason:
            outcome.kind, outcome.reason = FAULT, f"profile: {outcome.checks['profile']}"
        outcome.checks["profile"] = NOT_REACHED
        return
    except Exception as error:  # noqa: BLE001 - a traceback is an outcome
        outcome.reason = _traceback(error)
        return
    outcome.layers = f"{len(loaded.info.quantizable)} of {loaded.info.layers}"
    outcome.heads = ", ".join(map(str, loaded.info.geometries))
    outcome.note = "; ".join(line_of(each.message) for each in caught if "results are right" in str(each.message))
    _check(outcome, "equal", lambda: _equal(loaded))
    _check(outcome, "close", lambda: _close(loaded))
    for name in COMMANDS:
        _check(outcome, name, lambda name=name: _command(name))
    found = outcome.checks.values()
    if any(text.startswith(("wrong: ", "traceback: ")) for text in found):
        outcome.kind = FAULT
    else:
        outcome.kind = WORKS if set(found) == {YES} else PART


def _check(outcome: Outcome, name: str, check: Callable[[], None]) -> None:
    """Record what a check has shown."""
    try:
        check()
    except KvmixError as error:
        outcome.checks[name] = line_of(error)
    except Wrong as error:
        outcome.checks[name] = f"wrong: {error}"
    except Exception as error:  # noqa: BLE001 - a traceback is an outcome
        outcome.checks[name] = _traceback(error)
    else:
        outcome.checks[name] = YES


def _traceback(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"traceback: {type(error).__name__}: {line_of(error)} ({Path(place.filename).name})"


def build(model_type: str, folder: Path) -> str:
    """Save a small model of a type as its checkpoints are, with builtin:tiny's tokenizer; return the name of its class.

    Of a model that reads images it is the whole, which kvmix may load in part. Of an encoder-decoder whose decoder
    alone is listed there is a configuration, which decides.
    """
    config = small_config(model_type)
    if model_type in PARTS_OF_ENCODER_DECODERS:
        config.save_pretrained(folder)
        return type(config).__name__
    loader = find_loader(config, reads_images=True) or find_loader(config)
    if loader is None:
        raise ValueError(f"{type(config).__name__} is in none of transformers' lists")
    with torch.device("meta"):
        parameters = sum(each.numel() for each in loader.from_config(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"it has {parameters} parameters at the least")
    torch.manual_seed(0)
    model = loader.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (parameter.ndim == 2 and name.endswith("weight")) or (parameter.ndim == 3 and "experts" in name):
                parameter.normal_(0, 1.3 * parameter.shape[-1] ** -0.5)  # attention is far from uniform
    model.save_pretrained(folder)
    for file in (ASSETS / "tiny").glob("tokenizer*"):
        shutil.copy(file, folder)
    return type(model).__name__


def _command(name: str) -> None:
    """Run a command. Raises KvmixError for one that refuses in one line."""
    result = kvmix(*COMMANDS[name])
    if result.exit_code == 0:
        return
    error = next((line for line in reversed(result.stderr.splitlines()) if line.startswith("kvmix: error: ")), None)
    if error is None or "bug in kvmix" in result.stderr or "Traceback" in result.stderr:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    raise KvmixError(error.removeprefix("kvmix: error: "))


def _equal(loaded: LoadedModel) -> None:
    """Raise Wrong unless 16 bits decode what transformers' cache decodes, greedily, in a left-padded batch."""
    found = _decode(loaded.model, MixedCache.from_plan(_plan(loaded, 16), loaded.config))
    faults = []
    for attention in ("eager", None):  # a class may name one as its own that it does not really run with
        try:
            reference = type(loaded.model).from_pretrained("model", attn_implementation=attention).eval()
            expected = _decode(reference, DynamicCache(config=reference.config))
        except READS as error:
            faults.append(f"transformers' own cache does not decode a left-padded batch: {line_of(error)}")
            continue
        fault = _difference(found, expected)
        if fault is None:
            return
        faults.append(fault)
    raise Wrong(faults[-1])


@torch.inference_mode()
def _decode(model: transformers.PreTrainedModel, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the new tokens `[B, T]` of a greedy generation and their logits `[B, T, vocabulary]`."""
    ids = _ids(2, 40)
    mask = torch.ones_like(ids)
    ids[1, :7], mask[1, :7] = 0, 0
    settings = transformers.GenerationConfig(
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    made = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=settings)
    return made.sequences[:, ids.shape[1] :], torch.stack(made.logits, dim=1).float()


def _difference(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> str | None:
    """Return how two generations differ; None if only by rounding, which may part them where two tokens are tied."""
    for row in range(len(expected[0])):
        parted = (found[0][row] != expected[0][row]).nonzero().flatten().tolist()
        same = parted[0] + 1 if parted else found[0].shape[1]
        ours, theirs = found[1][row, :same], expected[1][row, :same]
        if not torch.isfinite(theirs).all():
            return f"logits of row {row} are not finite"
        differences = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
        if differences.median() > EQUAL:
            return f"logits of row {row} differ by {differences.median():.1g}"
        if parted and differences[-1] > EQUAL:
            return f"token {parted[0]} of row {row} differs, logits by {differences[-1]:.1g}"
    return None


@torch.inference_mode()
def _close(loaded: LoadedModel) -> None:
    """Raise Wrong unless predictions through 4 bits are near those of 16 bits, and packed tokens were read."""
    exact, packed = (MixedCache.from_plan(_plan(loaded, bits), loaded.config) for bits in (16, 4))
    ids = _ids(1, 72)[0].tolist()
    logits = []
    for cache in (exact, packed):
        prefill(loaded, cache, ids[:40])
        logits.append(torch.cat([part for _, part in feed(loaded, cache, ids[40:], 8)]))
    one, other = logits
    if packed.attended.share == 0:
        raise Wrong("no packed token was read")
    difference = ((one - other).norm(dim=-1) / one.norm(dim=-1)).median().item()
    if not 0 < difference < CLOSE:
        raise Wrong(f"logits at 4 bits differ by {difference:.2g}")


def _ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, 4000, (rows, tokens), generator=torch.Generator().manual_seed(1))


def _plan(loaded: LoadedModel, bits: int) -> Plan:
    return Plan.uniform(loaded.info, bits, bits, SETTINGS)


def line_of(error: object) -> str:
    """Return the first sentence of an error without what differs from machine to machine."""
    text = first_sentence(error) if isinstance(error, Exception) else str(error)
    text = re.sub(r"\S*/tmp\S*/model\b|\./model\b", "the model", " ".join(text.split()))
    text = re.sub(r"0x[0-9a-f]+", "0x...", text)
    return text if len(text) <= LONGEST_LINE else text[:LONGEST_LINE] + " ..."
