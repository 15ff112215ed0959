"""A task of lm-eval as a kvmix task: its requests are the samples, the answers the records, its numbers the metrics."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ....cache.subject import Subject
from ....counting import counted
from ....errors import EvaluationError
from ...base import Settings, Task
from ...records import HarnessRecord
from ...results import Estimate, Metric
from .answers import Answerer, parse_batch_size
from .data import LoadedTasks, TaskSetup, build_requests, load_tasks
from .metrics import reported_metrics
from .model import KvmixLM
from .names import select_tasks
from .replay import score_answers
from .requests import TokenRequest, encode_requests, merge_replies

if TYPE_CHECKING:
    from ....models.loading import LoadedModel


@dataclass
class HarnessTask(Task[TokenRequest, HarnessRecord]):
    """A task of lm-eval: its prompts go through the cache of a subject, and lm-eval scores the answers.

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

    unread: ClassVar[tuple[str, ...]] = ("length", "prefix", "text")
    default_limit: ClassVar[int] = 0
    """Unused: without a limit all documents are measured."""

    def __post_init__(self) -> None:
        self._selection = select_tasks(self.given, self.include_path)
        self._metrics = self._announced()
        self._built: BuiltRequests | None = None

    @property
    def name(self) -> str:
        """See `Task.name`."""
        return self.given

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Return what the tasks say they report; after `summarise`, also what they reported without saying so."""
        return self._metrics

    def options(self) -> dict[str, Any]:
        """Return all that the numbers depend on. The batch size is not part of it: a row reads the same in a batch."""
        options = {key: value for key, value in asdict(self).items() if key not in ("given", "batch_size")}
        return {**options, "lm_eval": _version()}

    def context(self, settings: Settings) -> None:
        """Return None: a prompt is as long as it is."""

    def samples(self, loaded: LoadedModel, settings: Settings) -> list[TokenRequest]:
        """Return all requests of lm-eval, the longest first; `settings.limit` is in documents of each task."""
        self._check(loaded)
        setup = self._setup(settings)
        lm = KvmixLM(loaded, step=settings.step, max_length=self.max_length)
        tasks = load_tasks(self._selection, setup, loaded)
        instances = build_requests(tasks["tasks"], setup, lm)
        requests = [request for kind, some in instances.items() for request in encode_requests(lm, kind, some)]
        counts = {kind: len(some) for kind, some in instances.items()}
        self._built = BuiltRequests(tasks, requests, counts, setup)
        return requests

    def records(
        self, loaded: LoadedModel, subject: Subject, samples: Sequence[TokenRequest], settings: Settings
    ) -> Iterator[HarnessRecord]:
        """Yield one record for each request, in their order."""
        answerer = Answerer(loaded, subject, settings.step, parse_batch_size(self.batch_size), settings.seed)
        for request, answer in zip(samples, answerer.answers(samples), strict=True):
            yield HarnessRecord(
                request=request.name, answer=answer.value, tokens=answer.tokens, attended=answer.attended
            )

    def measure(self, loaded: LoadedModel, subject: Subject, sample: TokenRequest, settings: Settings) -> HarnessRecord:
        """Return the record of one request alone."""
        return next(self.records(loaded, subject, [sample], settings))

    def summarise(
        self, records: Sequence[HarnessRecord], reference: Sequence[HarnessRecord] | None, seed: int
    ) -> dict[str, Estimate]:
        """Return lm-eval's numbers by the names of their metrics."""
        built = self._requests
        numbers = score_answers(built.tasks, built.replies(records), built.setup.limit, seed)
        known = {metric.name for metric in self._metrics}
        self._metrics += tuple(metric for metric in numbers if metric.name not in known)
        return {metric.name: estimate for metric, estimate in numbers.items()}

    def describe(self, samples: Sequence[TokenRequest], settings: Settings) -> str:
        """See `Task.describe`."""
        documents = len({(request.task, request.document) for request in samples})
        tasks = self._requests.tasks["tasks"].values()
        shots = sorted({task.get_config("num_fewshot") or 0 for task in tasks})
        return (
            f"{counted(documents, 'document')} of {self.name}, {'/'.join(map(str, shots))}-shot, "
            f"asked and scored by lm-eval {_version()} in {counted(len(samples), 'request')}, "
            "each answered through the cache"
        )

    def notices(self, samples: Sequence[TokenRequest], settings: Settings) -> tuple[str, ...]:
        """Return what was cut off, and which tasks ignore `--num-fewshot`."""
        found = []
        if cut := [request.cut for request in samples if request.cut]:
            found.append(
                f"{self.name}: {len(cut)} of {len(samples)} contexts do not fit and have lost their first tokens, "
                f"up to {max(cut)}"
            )
        tasks = self._requests.tasks["tasks"]
        fixed = [name for name, task in tasks.items() if task.get_config("num_fewshot") != self.num_fewshot]
        if self.num_fewshot is not None and fixed:
            found.append(f"{', '.join(fixed)}: always asked without examples, so --num-fewshot has no effect")
        return tuple(found)

    @property
    def _requests(self) -> BuiltRequests:
        if self._built is None:
            raise RuntimeError("samples() builds the requests and must be called first")
        return self._built

    def _announced(self) -> tuple[Metric, ...]:
        """Return the metrics of the task files; a task that is a Python class must be loaded to tell its own."""
        classes = load_tasks(self._selection, self._setup(Settings()))["tasks"] if self._selection.has_classes else {}
        return reported_metrics(self._selection, classes, self.max_length)

    def _setup(self, settings: Settings) -> TaskSetup:
        return TaskSetup(settings.limit, self.num_fewshot, self.apply_chat_template, self.max_length, settings.seed)

    def _check(self, loaded: LoadedModel) -> None:
        """Raise EvaluationError for an option that this model cannot follow."""
        if self.apply_chat_template and not loaded.tokenizer.chat_template:
            raise EvaluationError(
                f"the tokenizer of {loaded.info.id} has no chat template; leave out --apply-chat-template"
            )
        limit = loaded.max_length
        if self.max_length is not None and limit is not None and self.max_length > limit:
            raise EvaluationError(f"--max-length {self.max_length} is more than the model's limit of {limit} tokens")


@dataclass(frozen=True)
class BuiltRequests:
    """Tasks of lm-eval whose requests are built, and the passes that these take.

    Attributes:
        counts: requests of each kind.
    """

    tasks: LoadedTasks
    requests: Sequence[TokenRequest]
    counts: dict[str, int]
    setup: TaskSetup

    def replies(self, records: Sequence[HarnessRecord]) -> dict[str, list[Any]]:
        """Return the replies to lm-eval, by kind, from the records of all passes."""
        found: dict[str, list[Any]] = {}
        for kind, count in self.counts.items():
            answered = [
                (request, record["answer"])
                for request, record in zip(self.requests, records, strict=True)
                if request.kind == kind
            ]
            found[kind] = merge_replies(kind, count, answered)
        return found


def _version() -> str:
    return importlib.metadata.version("lm_eval")
