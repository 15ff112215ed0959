"""What a serving engine holds of a plan: blocks of tokens that are written one by one, each by itself. No torch.

Groups of keys run along channels instead of tokens, and there is neither a window nor an exact token. Of transform
codes without a window the sink stays in full precision: every block has room for it. `cache/blocks.py` has the storage.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from kvmix_kernels.layout import FULL_PRECISION_BITS, WORD_BITS, Kind, PageLayout
from kvmix_kernels.transform_layout import TransformLayout
from pydantic import Field, ValidationError

from ..errors import PlanError, together
from .codec import TransformTensor
from .document.geometry import HeadGeometry
from .document.strict_yaml import StrictModel
from .forms import page_layout
from .layers import AnyTensor, TensorPlan
from .plan import Plan
from .settings import CacheSettings
from .sizes import exact_tokens
from .windows import NoWindow

MEASURED: Final = "in_engine"
"""Name in a plan's provenance of what it loses in an engine."""
METRIC_WINDOW: Final = "metric_window"
"""Name in a plan's provenance of the window that the metric of its transform codes leaves out."""


def engine_cache() -> CacheSettings:
    """Return the cache of transform codes for engines: no window, and a sink of one token.

    The first token of a sequence has keys and values of its own kind in many models, which most queries attend to.
    """
    return CacheSettings(sink=1, window=NoWindow())


class EngineLoss(StrictModel):
    """The measured loss of a plan in an engine, as its provenance has it.

    Attributes:
        plan_sha256: checksum of the plan.
        text: source of the text.
        tokens: tokens that were scored.
        kl: divergence from the unquantized cache as an engine holds the plan, nats a token.
        plan_kl: the same in kvmix's own cache.
    """

    plan_sha256: str
    text: str
    tokens: int
    kl: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    plan_kl: Annotated[float, Field(ge=0, allow_inf_nan=False)]


def check_blocks(plan: Plan, block: int, ranks: int = 1) -> None:
    """Raise PlanError with every reason why an engine cannot hold a plan.

    Args:
        plan: the plan.
        block: tokens of a block.
        ranks: number of processes that share the KV heads of every layer.
    """
    faults = []
    if plan.cache.codecs is not None:
        faults.append("its cache has page codecs, which no kernel reads")
    elif plan.cache.axes:
        faults.append(f"its cache has {' and '.join(plan.cache.axes)}, which look at more than one token")
    if plan.model.stock:
        faults.append(f"layers {', '.join(map(str, plan.model.stock))} keep a cache of their own kind")
    if grouped := [index for index, layer in plan.layers.items() if layer.head_groups]:
        faults.append(
            f"layers {', '.join(map(str, grouped))} store KV heads in groups, and a block has one width of all"
        )
    for heads, layers in plan.model.geometries.items():
        if heads.key_dim != heads.value_dim:
            faults.append(f"layer {layers[0]} has keys of {heads.key_dim} channels and values of {heads.value_dim}")
        if heads.kv_heads % ranks:
            faults.append(f"layer {layers[0]} has {heads.kv_heads} KV heads, which {ranks} ranks do not divide")
        if heads.key_dim % WORD_BITS:
            faults.append(f"layer {layers[0]} has heads of {heads.key_dim} channels, no multiple of {WORD_BITS}")
    if block % WORD_BITS:
        faults.append(f"blocks of {block} tokens are no multiple of {WORD_BITS}")
    frame = None if plan.cache.transform is None else plan.cache.transform.frame
    if frame is not None and frame % block:
        faults.append(f"frames of {frame} positions are no whole blocks of {block} tokens")
    if faults:
        raise PlanError(f"an engine cannot hold the plan for {plan.model.id}: {together(faults)}")


def losses_in_blocks(plan: Plan) -> list[str]:
    """Return what of a plan's storage is another in blocks, in words; empty if nothing is."""
    found = []
    grouped = [
        i for i, each in plan.layers.items() if isinstance(each.k, TensorPlan) and each.k.bits < FULL_PRECISION_BITS
    ]
    if grouped:
        found.append(f"keys of {len(grouped)} layers in groups along channels, not tokens")
    if plan.cache.sink and not held_sink(plan):
        found.append(f"no sink of {plan.cache.sink}")
    if not isinstance(plan.cache.window, NoWindow):
        found.append(f"no window ({plan.cache.window.short})")
    if exact := max(exact_tokens(layer, plan.cache) for layer in plan.layers.values()):
        found.append(f"no exact tokens ({exact} a page)")
    return found


def block_layout(tensor: TensorPlan, cache: CacheSettings, dim: int, block: int) -> PageLayout | None:
    """Return the layout of blocks of affine keys or values: groups run along channels; None for full precision."""
    return page_layout(tensor, "value", cache.model_copy(update={"page": block}), dim)


def held_sink(plan: Plan) -> int:
    """Return the first tokens of a sequence that blocks keep: the sink of a plan of codes without a window."""
    tensors = [tensor for layer in plan.layers.values() for tensor, _ in layer.tensors]
    coded = all(isinstance(each, TransformTensor) or each.bits == FULL_PRECISION_BITS for each in tensors)
    is_for_engines = plan.cache.transform is not None and isinstance(plan.cache.window, NoWindow)
    return plan.cache.sink if coded and is_for_engines else 0


def without_full_precision(plan: Plan) -> Plan:
    """Return a plan without window and exact tokens, as an engine holds it but for groups of keys."""
    settings: dict[str, Any] = {"sink": held_sink(plan), "window": NoWindow()}
    if plan.cache.transform is not None:
        settings["transform"] = plan.cache.transform.model_copy(update={"exact": 0})
    cache = plan.cache.model_copy(update=settings)
    return Plan.build(plan.model, plan.layers, cache, plan.provenance)


def measured_loss(plan: Plan) -> EngineLoss | None:
    """Return what a plan loses in an engine; None if nobody has measured it, or the plan is another since."""
    try:
        found = EngineLoss.model_validate(plan.provenance.get(MEASURED))
    except ValidationError:
        return None
    return found if found.plan_sha256 == plan.sha256 else None


def with_loss(plan: Plan, loss: EngineLoss) -> Plan:
    """Return a plan whose provenance says what it loses in an engine."""
    return plan.model_copy(update={"provenance": {**plan.provenance, MEASURED: loss.model_dump()}})


def left_out(plan: Plan) -> str | None:
    """Return the window that the metric of a plan's transform codes leaves out; None if it counts all pairs.

    None also of plans without such codes, or whose provenance does not say.
    """
    window = plan.provenance.get(METRIC_WINDOW)
    return None if plan.cache.transform is None or window in (None, NoWindow().short) else str(window)


def stored_bits(plan: Plan) -> float:
    """Return the bits of an element in an engine's blocks, where each KV head's tokens take whole bytes."""
    heads = {index: plan.model.heads(index) for index in plan.layers}
    nbytes = sum(each.kv_heads * _token_bytes(plan, index, each) for index, each in heads.items())
    return 8 * nbytes / sum(each.token_elements for each in heads.values())


def _token_bytes(plan: Plan, index: int, heads: HeadGeometry) -> int:
    """Return the bytes of one token of one KV head of a layer."""
    sink = FULL_PRECISION_BITS * held_sink(plan) / plan.cache.page
    bits = sum(
        (_tensor_bits(tensor, kind, plan.cache, heads.dim(kind)) + sink * isinstance(tensor, TransformTensor))
        * heads.dim(kind)
        for tensor, kind in plan.layers[index].tensors
    )
    return -(-round(bits * heads.kv_heads) // (8 * heads.kv_heads))


def _tensor_bits(tensor: AnyTensor, kind: Kind, cache: CacheSettings, dim: int) -> float:
    """Return the bits of an element of keys or values."""
    if isinstance(tensor, TransformTensor):
        return TransformLayout(kind, tensor.runs, dim, cache.page).stored_bits
    layout = block_layout(tensor, cache, dim, cache.page)
    return tensor.bits if layout is None else layout.stored_bits
