"""A task of lm-eval as one of ours: its requests are the samples, answers the records, its numbers the metrics."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ....cache.subject import Subject
from ....errors import EvaluationError
from ...base import Settings, Task
from ...results import Estimate, Metric, Record, counted

if TYPE_CHECKING:
    from ....models.loading import LoadedModel
    from .data import Asked
    from .names import Found
    from .requests import Request


@dataclass(frozen=True)
class HarnessTask(Task):
    """What lm-eval asks goes through the cache of a plan; what lm-eval makes of the answers are the numbers.

    lm-eval is imported when the first of them is made.

    Attributes:
        given: a task of lm-eval, a group, a tag, or a pattern such as `ruler_*`.
        include_path: a folder with task files of the user's own.
        num_fewshot: examples in a prompt; None for what the task says.
        batch_size: requests at a time; None and `auto` for a number that fits.
        max_length: tokens of a prompt and its answer; None for the model's limit.
        apply_chat_template: put prompts into the tokenizer's chat template.

    Raises:
        EvaluationError: if there is no such task.
    """

    given: str
    include_path: Path | None = None
    num_fewshot: int | None = None
    batch_size: int | str | None = None
    max_length: int | None = None
    apply_chat_template: bool = False

    default_limit: ClassVar[int] = 0
    """Of no meaning here: without a limit all documents are asked about."""
    _prepared: ClassVar[Prepared]

    def __post_init__(self) -> None:
        _ = self.metrics

    @property
    def name(self) -> str:
        return self.given

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        from .data import load_tasks
        from .reports import metrics

        objects = load_tasks(self._found, self._asked(Settings()))["tasks"] if self._found.by_class else {}
        return metrics(self._found, objects, self.max_length)

    @cached_property
    def _found(self) -> Found:
        from ... import tasks
        from .names import find

        return find(self.given, self.include_path, tasks())

    def options(self) -> dict[str, Any]:
        """What the numbers depend on. Not how many requests share a batch: each reads what it would read alone."""
        options = {key: value for key, value in asdict(self).items() if key not in ("given", "batch_size")}
        return {**options, "lm_eval": _version()}

    def context(self, settings: Settings) -> None:
        """A prompt is as long as it is."""

    def samples(self, loaded: LoadedModel, settings: Settings) -> list[Request]:
        """Everything that lm-eval asks, the longest first; `settings.limit` is in documents of each task."""
        from .data import build_requests, load_tasks
        from .model import KvmixLM
        from .requests import encode

        self._check(loaded)
        asked = self._asked(settings)
        lm = KvmixLM(loaded, step=settings.step, max_length=self.max_length)
        tasks = load_tasks(self._found, asked, loaded)
        instances = build_requests(tasks["tasks"], asked, lm)
        requests = [request for kind, some in instances.items() for request in encode(lm, kind, some)]
        counts = {kind: len(some) for kind, some in instances.items()}
        object.__setattr__(self, "_prepared", Prepared(tasks, requests, counts, asked))
        return requests

    def records(
        self, loaded: LoadedModel, subject: Subject, samples: Sequence[Request], settings: Settings
    ) -> Iterator[Record]:
        from .batches import Reading, rows

        reading = Reading(loaded, subject, settings.step, rows(self.batch_size), settings.seed)
        for request, answer in zip(samples, reading.answers(samples), strict=True):
            yield {
                "request": request.name,
                "answer": answer.value,
                "tokens": answer.tokens,
                "attended": answer.attended,
            }

    def measure(self, loaded: LoadedModel, subject: Subject, sample: Request, settings: Settings) -> Record:
        """The answer to one request alone."""
        return next(self.records(loaded, subject, [sample], settings))

    def summarise(
        self, records: Sequence[Record], reference: Sequence[Record] | None, seed: int
    ) -> dict[str, Estimate]:
        from .replay import evaluate

        replies = self._prepared.replies([record["answer"] for record in records])
        numbers = evaluate(self._prepared.tasks, replies, self._prepared.asked.limit, seed)
        known = {metric.name for metric in self.metrics}
        vars(self)["metrics"] = (*self.metrics, *(metric for metric in numbers if metric.name not in known))
        return {metric.name: estimate for metric, estimate in numbers.items()}

    def describe(self, samples: Sequence[Request], settings: Settings) -> str:
        documents = len({(request.task, request.document) for request in samples})
        shots = sorted({task.get_config("num_fewshot") or 0 for task in self._prepared.tasks["tasks"].values()})
        return (
            f"{counted(documents, 'document')} of {self.name}, {'/'.join(map(str, shots))}-shot, "
            f"asked and scored by lm-eval {_version()} in {counted(len(samples), 'request')}, "
            "each answered through the cache"
        )

    def notices(self, samples: Sequence[Request], settings: Settings) -> tuple[str, ...]:
        said = []
        if cut := [request.cut for request in samples if request.cut]:
            said.append(
                f"{self.name}: {len(cut)} of {len(samples)} contexts do not fit and have lost their first tokens, "
                f"up to {max(cut)}"
            )
        tasks = self._prepared.tasks["tasks"]
        fixed = [name for name, task in tasks.items() if task.get_config("num_fewshot") != self.num_fewshot]
        if self.num_fewshot is not None and fixed:
            said.append(f"{', '.join(fixed)}: always asked without examples, so --num-fewshot has no effect")
        return tuple(said)

    def _asked(self, settings: Settings) -> Asked:
        from .data import Asked

        return Asked(settings.limit, self.num_fewshot, self.apply_chat_template, self.max_length, settings.seed)

    def _check(self, loaded: LoadedModel) -> None:
        """Raise EvaluationError for an option that this model has no way to follow."""
        if self.apply_chat_template and not loaded.tokenizer.chat_template:
            raise EvaluationError(
                f"the tokenizer of {loaded.info.id} has no chat template; leave out --apply-chat-template"
            )
        limit = loaded.max_length
        if self.max_length is not None and limit is not None and self.max_length > limit:
            raise EvaluationError(f"--max-length {self.max_length} is more than the model's limit of {limit} tokens")


@dataclass(frozen=True)
class Prepared:
    """Tasks of lm-eval whose requests are built, and the passes that these take.

    Attributes:
        tasks: see `data.load_tasks`.
        counts: requests of each kind.
    """

    tasks: dict[str, Any]
    requests: Sequence[Request]
    counts: Mapping[str, int]
    asked: Asked

    def replies(self, values: Sequence[Any]) -> dict[str, list[Any]]:
        """What lm-eval is told, by kind, from the values of all passes."""
        from .requests import replies

        found: dict[str, list[Any]] = {}
        for kind, count in self.counts.items():
            some = [(each, value) for each, value in zip(self.requests, values, strict=True) if each.kind == kind]
            found[kind] = replies(kind, count, some)
        return found


def _version() -> str:
    return importlib.metadata.version("lm_eval")
