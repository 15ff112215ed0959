import errno

import pytest
import torch
from architectures import build
from evaluating import SHORT, stand_in, tiny, uniform

from kvmix_cli.cache.baselines.named import named_cache
from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import EvaluationError, is_out_of_memory
from kvmix_cli.evaluation import get_task
from kvmix_cli.evaluation.base import Sample, Settings
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.evaluation.tasks import memory
from kvmix_cli.models import memory as peak
from kvmix_cli.models.geometry import model_info
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.plan.windows import NoWindow, Recent, Rpc

SETTINGS = Settings(length=320)
CACHES = {
    "defaults": CacheSettings(page=32),
    "sink": CacheSettings(page=32, sink=20, group_size=32, window=Recent(tokens=40)),
    "rows": CacheSettings(page=64, group_size="row", window=NoWindow()),
    "rpc": CacheSettings(page=32, group_size=32, sink=0, window=Rpc()),
    "short": SHORT,
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", CACHES.values(), ids=CACHES.keys())
@pytest.mark.parametrize("length", [32, 129, 320])
def test_predicted_and_measured_bytes_are_the_same(settings, length):
    mixed = Plan.from_short("0:k8v4,1-2:k2v2,3:k16v3,4-6:k1v2,7:k4v16", tiny().info, settings)
    sample = Sample("context", tuple(range(10, 10 + length)))
    for plan in (mixed, uniform(2, settings), uniform(16, settings)):
        record = get_task("memory").measure(tiny(), Subject("plan", plan), sample, SETTINGS)
        assert record["planned"] == record["measured"] == record["predicted"]
        assert record["allocated"] >= record["measured"]


@pytest.mark.slow
def test_a_report_compares_with_16_bits():
    report = run_task(get_task("memory"), tiny(), [Subject("two", uniform(2)), Subject("full", uniform(16))], SETTINGS)
    reference, two, full = report.rows
    elements = 2 * 8 * 2 * 64 * 320
    assert reference.value("measured_bytes") == full.value("measured_bytes") == 4 * elements
    assert two.value("bf16_bytes") == reference.value("bf16_bytes") == 2 * elements
    assert two.value("compression") == 2 * elements / two.value("measured_bytes") > 2.9
    assert two.value("prediction_error_percent") == 0
    assert two.quantized_share > 0.9
    assert "predicted_bytes" not in reference.metrics


def test_a_wrong_prediction_is_said_loudly(monkeypatch):
    true = memory.predicted_bytes
    monkeypatch.setattr(memory, "predicted_bytes", lambda *arguments: int(1.02 * true(*arguments)))
    report = run_task(get_task("memory"), tiny(), [Subject("two", uniform(2))], SETTINGS)
    assert report.plans[0].value("prediction_error_percent") == pytest.approx(2, abs=0.01)
    assert "two: the plan's prediction is off by +2.00 %" in report.plans[0].warnings[0]


def test_layers_that_keep_their_stock_cache_are_measured_but_not_predicted():
    model = build("gemma3", torch.float32)
    info = model_info(model.config, "gemma3", None)
    plan = Plan.build(info, {index: uniform(2).layers[0] for index in info.quantizable}, SHORT)
    sample = Sample("context", tuple(range(100)))
    task = get_task("memory")
    loaded = stand_in(model=model, info=info)
    reference, record = (task.measure(loaded, subject, sample, SETTINGS) for subject in (Subject(), Subject("p", plan)))
    assert record["predicted"] == record["planned"] < record["measured"] < reference["measured"]
    metrics = task.summarise([record], [reference], seed=0)
    assert metrics["predicted_bytes"].value == metrics["measured_bytes"].value
    assert metrics["prediction_error_percent"].value == 0


@pytest.mark.slow
def test_the_peak_is_measured_above_what_was_taken_before(monkeypatch):
    """Fakes of the system's counters: 100 bytes before, 350 at most."""
    monkeypatch.setattr(peak, "_start", lambda on: 100)
    monkeypatch.setattr(peak, "_highest", lambda on: 350)
    report = run_task(get_task("memory"), tiny(), [Subject("two", uniform(2))], SETTINGS)
    assert [row.value("peak_bytes") for row in report.rows] == [250, 250]


@pytest.mark.slow
def test_a_peak_that_cannot_be_measured_is_not_there(monkeypatch):
    monkeypatch.setattr(peak, "_start", lambda on: None)
    report = run_task(get_task("memory"), tiny(), [Subject("two", uniform(2))], SETTINGS)
    assert all("peak_bytes" not in row.metrics for row in report.rows)
    assert "peak" not in report.plans[0].records[0]


@pytest.mark.skipif(not peak.PROCESS.exists(), reason="needs /proc")
@pytest.mark.parametrize("mib", [64, 256])
def test_memory_that_is_taken_and_given_back_is_seen(mib):
    size = mib * 2**20
    with peak.watch({torch.device("cpu")}) as seen:
        block = torch.ones(size, dtype=torch.uint8)
        del block
    assert abs(seen.bytes - size) < size / 16, "the system counts pages in batches"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("out of memory of names"), False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error, is_memory):
    def work():
        raise error

    cpu = {torch.device("cpu")}
    assert is_out_of_memory(error) == is_memory
    if is_memory:
        assert peak.attempt(work, cpu) is None
    else:
        with pytest.raises(type(error)):
            peak.attempt(work, cpu)


@pytest.mark.slow
def test_a_real_allocation_that_is_too_large_is_out_of_memory():
    assert peak.attempt(lambda: torch.empty(2**60, dtype=torch.uint8), {torch.device("cpu")}) is None


def test_a_baseline_is_not_compared_with_itself_where_the_unquantized_cache_does_not_fit():
    task, loaded = get_task("memory"), tiny()
    baseline = Subject("fp8", baseline=named_cache("fp8", loaded.config, loaded.model.dtype, loaded.device))
    record = task.measure(loaded, baseline, Sample("context", tuple(range(10, 330))), SETTINGS)
    assert "compression" not in task.summarise([record], None, seed=0)
    own = task.measure(loaded, Subject(), Sample("context", tuple(range(10, 330))), SETTINGS)
    assert task.summarise([own], None, seed=0)["compression"].value == 2 * 320 / (4 * 320)


def test_one_token_is_too_short():
    with pytest.raises(EvaluationError, match="--length must be at least 2 for memory, got 1"):
        get_task("memory").samples(tiny(), Settings(length=1))
