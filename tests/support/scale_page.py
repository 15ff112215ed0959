"""The tables of docs/scale.md, from the roofline alone.

python tests/support/scale_page.py     write them into the page, between its marks
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmix_cli.models.activations import ActivationSizes
from kvmix_cli.models.stock import StockLayer
from kvmix_cli.models.weight_bytes import WeightBytes
from kvmix_cli.plan import HeadGeometry, ModelInfo, Plan
from kvmix_cli.plan.sizes import format_bytes
from kvmix_cli.studies.fit.facts import ModelFacts
from kvmix_cli.studies.fit.formats import CacheFormat, PlanFormat, VllmFormat
from kvmix_cli.studies.fit.gpus import GPUS
from kvmix_cli.studies.fit.roofline import MACHINE, GpuGroup, Roofline

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
CONTEXTS = {"8K": 2**13, "32K": 2**15, "128K": 2**17, "1M": 2**20}
COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Shape:
    """The sizes of a dense model of the Llama 3.1 family."""

    name: str
    layers: int
    hidden: int
    heads: int
    feed_forward: int
    weights_dtype: str
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 128256

    @property
    def parameters(self) -> int:
        """Return the number of weights: attention, feed-forward, two norms a layer, embeddings, output, last norm."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.feed_forward + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden


SHAPES = {
    "8B": Shape("Llama 3.1 8B", 32, 4096, 32, 14336, "bfloat16"),
    "70B": Shape("Llama 3.1 70B", 80, 8192, 64, 28672, "float8"),
    "405B": Shape("Llama 3.1 405B", 126, 16384, 128, 53248, "float8"),
}


def facts_of(shape: Shape) -> ModelFacts:
    """Return the facts of a model, without the limit of its context."""
    heads = HeadGeometry(kv_heads=shape.kv_heads, key_dim=shape.head_dim, value_dim=shape.head_dim)
    info = ModelInfo(id=shape.name, layers=shape.layers, kv_heads=shape.kv_heads, head_dim=shape.head_dim)
    layers = (StockLayer("full", heads, is_planned=True),) * shape.layers
    sizes = ActivationSizes(
        hidden=shape.hidden,
        queries=shape.heads * shape.head_dim,
        keys=heads.token_elements,
        feed_forward=3 * shape.feed_forward,
        vocabulary=shape.vocabulary,
        sliding=0,
        window=None,
    )
    weights = WeightBytes({"BF16": (shape.parameters, 2 * shape.parameters)}, "its sizes")
    return ModelFacts(info, layers, weights, sizes, None, "bfloat16")


def roofline_of(shape: Shape, key: str, count: int, dtype: str | None = None) -> Roofline:
    """Return a model on some GPUs of one kind."""
    facts, dtype = facts_of(shape), dtype or shape.weights_dtype
    return Roofline(facts, GpuGroup(key, GPUS[key], count), facts.weights.at(dtype), is_fp8=dtype == "float8")


def forms_of(facts: ModelFacts) -> tuple[CacheFormat, CacheFormat, CacheFormat]:
    """Return the caches that are compared: vLLM's in bf16 and fp8, and a plan of 3 bits."""
    plan = Plan.uniform(facts.info, 3, 3)
    bf16, fp8 = (VllmFormat(f"{size}", facts, 2, None, number_bytes=size) for size in (2, 1))
    return bf16, fp8, PlanFormat("3 bits", facts, 2, None, plan=plan)


def memory_table() -> Iterator[Sequence[str]]:
    """Yield weights, and the cache of one sequence at every context, in bf16 and at 3 bits."""
    yield ["model", "weights", *(f"cache at {name}" for name in CONTEXTS)]
    for shape in SHAPES.values():
        facts = facts_of(shape)
        bf16, _, three = forms_of(facts)
        sizes = [
            f"{format_bytes(bf16.cache_bytes(tokens, 1))} / {format_bytes(three.cache_bytes(tokens, 1))}"
            for tokens in CONTEXTS.values()
        ]
        dtype = {"bfloat16": "bf16", "float8": "fp8"}[shape.weights_dtype]
        yield [shape.name, f"{format_bytes(facts.weights.at(shape.weights_dtype))} {dtype}", *sizes]


def growth_table(name: str) -> Iterator[Sequence[str]]:
    """Yield the largest batch and its tokens a second, by GPUs and context, in bf16 and at 3 bits.

    Up to 8 GPUs share the heads; more are several groups of 8, which have nothing to do with each other.
    """
    shape = SHAPES[name]
    yield ["H100", *CONTEXTS]
    for count in COUNTS:
        roofline = roofline_of(shape, "h100", min(count, MACHINE))
        groups = count // roofline.group.count
        bf16, _, three = forms_of(roofline.facts)
        cells = []
        for tokens in CONTEXTS.values():
            rows = [roofline.row(form, tokens, 1) for form in (bf16, three)]
            pairs = [
                (groups * row.max_batch, groups * (row.max_tokens_per_s or 0.0)) for row in rows if row is not None
            ]
            cells.append(" / ".join(f"{batch}: {_speed(speed)}" if batch else "-" for batch, speed in pairs))
        yield [f"{count}", *cells]


def gpu_table() -> Iterator[Sequence[str]]:
    """Yield Llama 3.1 70B at 128K tokens on 8 GPUs of each kind: one sequence, and as many as fit."""
    yield ["8 x", "memory", "bandwidth", "one sequence", "batch in bf16", "in fp8", "at 3 bits"]
    for key in GPUS:
        roofline = roofline_of(SHAPES["70B"], key, 8)
        rows = [roofline.row(form, CONTEXTS["128K"], 1) for form in forms_of(roofline.facts)]
        cells = [
            f"{row.max_batch}: {_speed(row.max_tokens_per_s or 0.0)}" if row is not None and row.max_batch else "-"
            for row in rows
        ]
        gpu, first = GPUS[key], rows[0]
        alone = f"{1000 * first.step_seconds:.3g} ms" if first is not None and first.fits else "-"
        yield [key, f"{gpu.memory / 1e9:.0f} GB", f"{gpu.bandwidth / 1e12:.3g} TB/s", alone, *cells]


@dataclass(frozen=True)
class Published:
    """A figure that somebody has published, and the setting that it was measured in.

    Attributes:
        value: milliseconds a token of each sequence, or output tokens a second where there is a prompt to count in.
        prompt, output: tokens of a request.
        kv_bytes: bytes of a number in the cache.
    """

    source: str
    shape: str
    key: str
    count: int
    dtype: str
    kv_bytes: int
    batch: int | None
    prompt: int
    output: int
    value: float
    is_rate: bool = False


PUBLISHED = (
    Published("vLLM performance benchmark, build 9515", "8B", "h200", 1, "bfloat16", 2, 8, 32, 128, 833.421 / 128),
    Published("vLLM performance benchmark, build 9515", "70B", "h200", 4, "bfloat16", 2, 8, 32, 128, 2077.53 / 128),
    Published("NVIDIA NIM 1.8.0, Llama 3.3 70B", "70B", "h100", 2, "float8", 1, 1, 5000, 500, 18.58),
    Published("NVIDIA NIM 1.8.0, Llama 3.3 70B", "70B", "h100", 2, "float8", 1, 5, 5000, 500, 21.83),
    Published("NVIDIA NIM 1.8.0, Llama 3.3 70B", "70B", "h100", 2, "float8", 1, 25, 5000, 500, 38.75),
    Published("TensorRT Model Optimizer", "405B", "h200", 8, "float8", 1, None, 2048, 128, 463.1, True),
    Published("TensorRT Model Optimizer", "405B", "h200", 8, "float8", 1, None, 32768, 2048, 320.1, True),
    Published("TensorRT Model Optimizer", "405B", "h200", 8, "float8", 1, None, 120000, 2048, 71.5, True),
)


def published_table() -> Iterator[Sequence[str]]:
    """Yield published figures beside the bound in the same setting."""
    yield ["source", "model", "GPUs", "sequences", "prompt + output", "published", "bound", "share of the bound"]
    for each in PUBLISHED:
        roofline = roofline_of(SHAPES[each.shape], each.key, each.count, each.dtype)
        form = VllmFormat("there", roofline.facts, 2, None, number_bytes=each.kv_bytes)
        context = each.prompt + each.output // 2
        dtype = {"bfloat16": "bf16", "float8": "fp8"}[each.dtype]
        if each.is_rate:
            bound = rate(roofline, form, each.prompt, each.output)
            published, limit, share = f"{_speed(each.value)} tokens/s", f"{_speed(bound)} tokens/s", each.value / bound
        else:
            seconds, _ = roofline.step(form, context, each.batch or 1)
            published, limit = f"{each.value:.3g} ms", f"{1000 * seconds:.3g} ms"
            share = 1000 * seconds / each.value
        batch = "most" if each.batch is None else f"{each.batch}"
        gpus = f"{each.count} x {each.key}, {dtype}"
        yield [each.source, each.shape, gpus, batch, f"{each.prompt} + {each.output}", published, limit, f"{share:.0%}"]


def rate(roofline: Roofline, form: CacheFormat, prompt: int, output: int) -> float:
    """Return output tokens a second at most, with as many sequences as fit: prompts and steps take turns."""
    row = roofline.row(form, prompt + output, 1)
    assert row is not None
    step, _ = roofline.step(form, prompt + output // 2, row.max_batch)
    seconds = row.max_batch * roofline.prefill_seconds(prompt) + output * step
    return row.max_batch * output / seconds


def _speed(tokens: float) -> str:
    return f"{tokens:.3g}" if tokens < 1000 else f"{tokens / 1000:.3g}k"


TABLES = {
    "memory": memory_table,
    **{f"growth-{name}": lambda name=name: growth_table(name) for name in SHAPES},
    "gpus": gpu_table,
    "published": published_table,
}


def markdown(rows: Iterator[Sequence[str]]) -> str:
    """Return a table."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---", *["--:"] * (len(head) - 1)], *body)) + "\n"


def written(page: str) -> str:
    """Return the page with its tables."""
    for name, table in TABLES.items():
        mark = f"<!-- table: {name} -->\n"
        assert page.count(mark) == 1, name
        page = re.sub(f"({re.escape(mark)})(?:\\|.*\n)*", lambda match, table=table: match[1] + markdown(table()), page)
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
