"""What kvmix does with every architecture that transformers lists, each built small and with random weights.

An architecture goes through the same six checks, in a folder of its own: 16 bits equal to transformers' cache, 4 bits
close to it, and the four commands. Its `Outcome` has for each check `yes`, `-` if it was not reached, or a reason.

    python tests/support/matrix.py RESULTS.jsonl [TYPE ...]     go on with a matrix; existing rows are kept
"""

import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from commandline import kvmix
from shrinking import OVERRIDES, model_types, small_config
from transformers.cache_utils import Cache, DynamicCache

from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.decoding.feed import feed, prefill
from kvmix_cli.errors import KvmixError, first_sentence
from kvmix_cli.models.loading import LoadedModel, load_model
from kvmix_cli.models.multimodal import find_loader
from kvmix_cli.models.sources import ASSETS
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.plan.windows import Recent

CHECKS = ("equal", "close", "profile", "allocate", "run", "eval")
WORKS, PART, REFUSED, NOT_BUILT, FAULT = "works", "in part", "refused", "not built", "fault"
CLASSES = (WORKS, PART, REFUSED, NOT_BUILT, FAULT)
"""Classes of outcome: all six checks pass, some, the model is refused in one line, cannot be built small, or kvmix is
wrong: a traceback, a crash, a hang, or other tokens at 16 bits without a word."""
SECONDS = 120
"""Most time for one architecture, in which most take a few seconds."""
MOST_PARAMETERS = 130_000_000
YES, NOT_REACHED = "yes", "-"
_SETTINGS = CacheSettings(page=16, sink=2, group_size=16, window=Recent(tokens=8))
_PROMPT = "The cache keeps keys and values of every token that was read. " * 8
COMMANDS = {
    "profile": ("profile", "./model", "--samples", 1, "--seq-len", 96),
    "allocate": ("allocate", "--avg-bits", 3, "--group-size", 16, "--page", 16, "--window", "recent:16"),
    "run": ("run", "./model", "--prompt", _PROMPT, "--max-new-tokens", 6),
    "eval": ("eval", "./model", "--length", 128, "--prefix", 64, "--limit", 1),
}


@dataclass
class Outcome:
    """What became of one architecture.

    Attributes:
        type: model type, as in config.json.
        name: class of the model, empty if it could not be built.
        checks: by name, `yes`, `-` or a reason in one line.
        kind: class of outcome.
        reason: the first reason, empty if all is well.
        note: what kvmix warned of on loading.
    """

    type: str
    name: str = ""
    checks: dict[str, str] = field(default_factory=lambda: dict.fromkeys(CHECKS, NOT_REACHED))
    kind: str = FAULT
    reason: str = ""
    note: str = ""


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
    outcome.reason = next((text for text in (outcome.reason, *outcome.checks.values()) if text not in (YES, NOT_REACHED, "")), "")
    return outcome


def _examine(outcome: Outcome) -> None:
    try:
        outcome.name = build(outcome.type, Path("model"))
    except Exception as error:  # noqa: BLE001 - a class of transformers may raise anything
        outcome.kind, outcome.reason = NOT_BUILT, f"{type(error).__name__}: {_line(error)}"
        return
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = load_model("./model")
    except KvmixError as error:
        outcome.kind, outcome.reason = REFUSED, _line(error)
        _check(outcome, "profile", lambda: _command("profile"))
        if outcome.checks["profile"] != outcome.reason:
            outcome.kind, outcome.reason = FAULT, f"profile: {outcome.checks['profile']}"
        outcome.checks["profile"] = NOT_REACHED
        return
    outcome.note = "; ".join(_line(each.message) for each in caught if "results are right" in str(each.message))
    sound = [
        _check(outcome, "equal", lambda: _equal(loaded)),
        _check(outcome, "close", lambda: _close(loaded)),
        *(_check(outcome, name, lambda name=name: _command(name)) for name in COMMANDS),
    ]
    passed = [text == YES for text in outcome.checks.values()]
    outcome.kind = FAULT if not all(sound) else WORKS if all(passed) else PART if any(passed) else REFUSED


def _check(outcome: Outcome, name: str, check: Callable[[], None]) -> bool:
    """Record a check; return whether it passed, or was refused in one line."""
    try:
        check()
    except KvmixError as error:
        outcome.checks[name] = _line(error)
        return True
    except Wrong as error:
        outcome.checks[name] = f"wrong: {error}"
        return False
    except Exception as error:  # noqa: BLE001 - a traceback is an outcome
        place = traceback.extract_tb(error.__traceback__)[-1]
        outcome.checks[name] = f"traceback: {type(error).__name__}: {_line(error)} ({Path(place.filename).name})"
        return False
    outcome.checks[name] = YES
    return True


def build(model_type: str, folder: Path) -> str:
    """Save a small model of a type, with builtin:tiny's tokenizer; return the name of its class."""
    config = small_config(model_type, OVERRIDES.get(model_type))
    loader = find_loader(config)
    if loader is None:
        raise ValueError("no loader of transformers knows its configuration")
    with torch.device("meta"):
        parameters = sum(each.numel() for each in loader.from_config(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"{parameters} parameters")
    torch.manual_seed(0)
    model = loader.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and name.endswith("weight") or parameter.ndim == 3 and "experts" in name:
                parameter.normal_(0, 1.3 * parameter.shape[-1] ** -0.5)  # attention is far from uniform
    model.save_pretrained(folder)
    for file in (ASSETS / "tiny").glob("tokenizer*"):
        shutil.copy(file, folder)
    return type(model).__name__


def _command(name: str) -> None:
    result = kvmix(*COMMANDS[name])
    if result.exit_code == 0:
        return
    error = next((line for line in reversed(result.stderr.splitlines()) if line.startswith("kvmix: error: ")), None)
    if error is None or "bug in kvmix" in result.stderr or "Traceback" in result.stderr:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    raise KvmixError(error.removeprefix("kvmix: error: "))


def _ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, 4000, (rows, tokens), generator=torch.Generator().manual_seed(1))


def _equal(loaded: LoadedModel) -> None:
    """Raise Wrong unless 16 bits decode the tokens that transformers' cache decodes, in a left-padded batch."""
    got = _decode(loaded.model, MixedCache.from_plan(_plan(loaded, 16), loaded.config))
    faults = []
    for attention in ("eager", None):
        try:
            reference = type(loaded.model).from_pretrained("model", attn_implementation=attention).eval()
            expected = _decode(reference, DynamicCache(config=reference.config))
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
            faults.append(f"transformers' own cache does not decode a left-padded batch: {_line(error)}")
            continue
        fault = _difference(got, expected)
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
        max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=True,
        return_dict_in_generate=True, output_logits=True,
    )
    made = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=settings
    )
    return made.sequences[:, ids.shape[1] :], torch.stack(made.logits, dim=1).float()


def _difference(got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> str | None:
    """Return how two generations differ; None if only by rounding, which may part them where two tokens are tied."""
    for row in range(len(expected[0])):
        parted = (got[0][row] != expected[0][row]).nonzero().flatten().tolist()
        same = parted[0] + 1 if parted else got[0].shape[1]
        ours, theirs = got[1][row, :same], expected[1][row, :same]
        if not torch.isfinite(theirs).all():
            continue
        difference = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
        if parted and difference[-1] > 1e-3:
            return f"token {parted[0]} of row {row} differs, logits by {difference[-1]:.1g}"
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
    if not 0 < difference < 0.5:
        raise Wrong(f"logits differ by {difference:.2g}")


def _plan(loaded: LoadedModel, bits: int) -> Plan:
    return Plan.uniform(loaded.info, bits, bits, _SETTINGS)


def _line(error: object) -> str:
    """Return the first sentence of an error without what differs from machine to machine."""
    text = first_sentence(error) if isinstance(error, Exception) else str(error)
    text = re.sub(r"\S*/tmp\S*/model\b|\./model\b", "the model", " ".join(text.split()))
    return re.sub(r"0x[0-9a-f]+", "0x...", text)[:300]


def run_matrix(results: Path, types: Iterable[str], workers: int = 1, seconds: float = SECONDS) -> dict[str, Outcome]:
    """Return the outcomes of some types; those in `results` are taken from there, new ones are added to it."""
    found = read(results)
    todo = [name for name in types if name not in found]
    context = multiprocessing.get_context("spawn")
    places = [_Place(context) for _ in range(min(workers, len(todo)))]
    with results.open("a", encoding="utf-8") as file:
        while todo or any(place.type for place in places):
            for place in places:
                if place.type is None and todo:
                    place.give(todo.pop(0), seconds)
                if place.type is not None and (outcome := place.taken()) is not None:
                    found[outcome.type] = outcome
                    file.write(json.dumps(asdict(outcome)) + "\n")
                    file.flush()
                    print(f"{len(found)}: {outcome.type} {outcome.kind} {outcome.reason}", file=sys.stderr, flush=True)
    for place in places:
        place.close()
    return {name: found[name] for name in sorted(found)}


def read(results: Path) -> dict[str, Outcome]:
    """Return the outcomes in a file, none if there is no file."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    outcomes = (Outcome(**json.loads(line)) for line in lines)
    return {outcome.type: outcome for outcome in outcomes}


class _Place:
    """A process that examines one architecture after another, and is replaced if one hangs or kills it."""

    def __init__(self, context: multiprocessing.context.SpawnContext) -> None:
        self.context, self.type = context, None
        self.start()

    def start(self) -> None:
        self.connection, other = self.context.Pipe()
        self.process = self.context.Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def give(self, model_type: str, seconds: float) -> None:
        import time

        self.type, self.until, self.seconds = model_type, time.monotonic() + seconds, seconds
        self.connection.send(model_type)

    def taken(self) -> Outcome | None:
        """Return the outcome of the architecture in work, None if it is not there yet."""
        import time

        outcome = Outcome(self.type)
        try:
            if self.connection.poll(0.2):
                outcome = self.connection.recv()
            elif time.monotonic() < self.until:
                return None
            else:
                outcome.reason = f"takes longer than {self.seconds:.0f} s"
        except EOFError:
            outcome.reason = "the process crashed"
        if outcome.name == "" and outcome.kind == FAULT:
            self.process.kill()
            self.process.join()
            self.start()
        self.type = None
        return outcome

    def close(self) -> None:
        self.process.kill()


def _serve(connection: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    while True:
        connection.send(examine(connection.recv()))


if __name__ == "__main__":
    run_matrix(Path(sys.argv[1]), sys.argv[2:] or model_types(), int(os.environ.get("WORKERS", "1")))
