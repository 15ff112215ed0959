"""Run folders for tests of what reads them: written by the runner itself, with numbers that are made up."""

from evaluating import INFO, stand_in, uniform

from kvmix_cli.cache.subject import Subject
from kvmix_cli.evaluation.base import Sample, Settings, Task
from kvmix_cli.evaluation.results import Estimate, Metric
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.evaluation.runs import RunFolders

PERPLEXITY = (
    Metric("perplexity", higher_is_better=False),
    Metric("perplexity_increase_percent", higher_is_better=False, unit="%", plans_only=True),
)
RECALL = (Metric("recall", higher_is_better=True),)
MEMORY = (Metric("measured_bytes", higher_is_better=False, unit="bytes"),)
SPEED = (
    Metric("prompt_tokens_per_s", higher_is_better=True),
    Metric("decode_tokens_per_s", higher_is_better=True),
)
FOUR, TWO = Subject("four", uniform(4, info=INFO)), Subject("two", uniform(2, info=INFO))


class Scripted(Task):
    """Reports what it is told to.

    Args:
        numbers: of a subject: metrics by name, each a value or a (value, low, high).
        record: of a subject and a sample's index: what its record has beside the usual.
    """

    name, metrics, default_limit = "", (), 2

    def __init__(self, name, metrics, numbers, record=lambda subject, index: {}, timed=False, samples=2):
        self.name, self.metrics, self.numbers, self.record, self.count = name, metrics, numbers, record, samples
        self.subject = None
        self.timed = timed

    def samples(self, loaded, settings):
        return [Sample(str(index), (index, settings.length)) for index in range(settings.limit or self.count)]

    def measure(self, loaded, subject, sample, settings):
        quantized = 0 if subject.plan is None and subject.baseline is None else 80
        attended = {"total": 100, "quantized": quantized}
        return {"tokens": 1, "who": subject.name, "attended": attended, **self.record(subject, sample.ids[0])}

    def summarise(self, records, reference, seed):
        numbers = self.numbers(records[0]["who"])
        return {
            name: Estimate(*(number if isinstance(number, tuple) else [number] * 3)) for name, number in numbers.items()
        }

    def describe(self, samples, settings):
        return f"{len(samples)} samples of {settings.length} tokens"


def measured(root, task, subjects=(FOUR, TWO), *, resume=False, settings=None, command="kvmix eval --some", **changes):
    """RunFolders of a task in a folder, as `kvmix eval` leaves them."""
    loaded = stand_in(**changes)
    runs = RunFolders(root, loaded.info.id.replace(":", "--").replace("/", "--"), resume, command)
    return run_task(task, loaded, subjects, settings or Settings(), runs)


def perplexity(numbers=None):
    """`two` is 3 % worse than the unquantized cache, `four` 0.5 %."""
    known = numbers or {
        "unquantized": {"perplexity": (10.0, 8.0, 12.0)},
        "four": {"perplexity": (10.05, 8.1, 12.1), "perplexity_increase_percent": (0.5, 0.1, 0.9)},
        "two": {"perplexity": (10.3, 8.2, 12.4), "perplexity_increase_percent": (3.0, 2.0, 4.0)},
    }
    return Scripted("perplexity", PERPLEXITY, lambda name: known.get(name, known["four"]))


def recall(samples=2, lost=None, context=1024):
    """Six values in every exercise.

    Args:
        lost: how many values each subject loses, by name; by default `two` loses the half that was stated first.
    """

    def is_recalled(subject, index, place):
        if lost is None:
            return subject.name != "two" or place > 2
        return index * 6 + place >= lost.get(subject.name, 0)

    def record(subject, index):
        answers = [
            {"depth": place / 12, "distance": 900 - 60 * place, "recalled": is_recalled(subject, index, place)}
            for place in range(6)
        ]
        return {"context": context, "answers": answers}

    def numbers(name):
        gone = {"two": 3 * samples} if lost is None else lost
        return {"recall": 1 - gone.get(name, 0) / (6 * samples)}

    return Scripted("recall", RECALL, numbers, record, samples=samples)


def memory():
    """In bytes, not at all in proportion to stored bits."""
    sizes = {"unquantized": 8 << 20, "four": 2 << 20, "two": 3 << 20}
    return Scripted("memory", MEMORY, lambda name: {"measured_bytes": float(sizes.get(name, 1 << 20))})


def throughput(contexts=(512, 1024), batches=(1, 8)):
    """`two` decodes twice as fast as the others; it has no memory for the largest context and batch."""
    points = [(context, batch) for context in contexts for batch in batches]

    def record(subject, index):
        context, batch = points[index]
        out = subject.name == "two" and points[index] == points[-1]
        seconds = [] if out else [0.5 if subject.name == "two" else 1.0]
        return {
            "context": context,
            "batch": batch,
            "new_tokens": 33,
            "out_of_memory": out,
            "prompt_seconds": seconds,
            "decode_seconds": seconds,
            "cache_bytes": 1000,
            "peak_bytes": None,
            "attention": "kvmix",
        }

    speeds = {"prompt_tokens_per_s": (500.0, 450.0, 550.0), "decode_tokens_per_s": 32.0}
    return Scripted("throughput", SPEED, lambda name: speeds, record, timed=True, samples=len(points))
