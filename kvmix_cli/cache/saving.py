"""The file of a packed prompt cache: safetensors, which loading maps into memory.

layers.N. ...   what `exchange` of each layer names: codes, scales, zeros, sinks, tails, states
ids             [B, T] int32, the tokens that it holds
kvmix           metadata: one line of JSON, `CacheHeader`
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from .._version import __version__
from ..errors import CacheError
from ..files import safetensors_head, write_parts
from ..models.geometry import fingerprint
from ..plan import Plan
from ..plan.document.strict_yaml import StrictModel
from .archive import Archive
from .buffer import lasting
from .layer import MixedLayer
from .stock import exchange_stock, stock_cut

FORMAT: Final = "kvmix-cache/1"
IDS = "ids"
SAMPLED_TENSORS, SAMPLED_NUMBERS = 512, 64
"""Weights that the checksum of a model looks at: so many of its tensors at most, and so many numbers of each."""
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in safetensors."""


class CacheHeader(StrictModel):
    """The metadata of a cache file.

    Attributes:
        kvmix: version that wrote it.
        model: id of the model, for messages.
        config_sha256: checksum of the model's configuration.
        weights_sha256: checksum of a sample of its weights.
        plan_sha256: checksum of the plan.
        dtype: of the model.
        tokens: tokens of each sequence.
        ids_sha256: checksum of the token ids.
        facts: what the layers keep beside tensors, by name.
        seal: checksum of all the above, and of the tensors' names, dtypes and shapes.
    """

    format: Literal["kvmix-cache/1"] = FORMAT
    kvmix: str = __version__
    model: str
    config_sha256: str
    weights_sha256: str
    plan_sha256: str
    dtype: str
    tokens: int
    ids_sha256: str
    facts: dict[str, Any]
    seal: str = ""

    def sealed(self, tensors: Mapping[str, Tensor]) -> CacheHeader:
        """Return the same header with the seal that it must have beside these tensors."""
        forms = sorted((name, str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items())
        text = json.dumps([self.model_dump(exclude={"seal"}), forms], sort_keys=True)
        return self.model_copy(update={"seal": hashlib.sha256(text.encode()).hexdigest()})


@dataclass(frozen=True)
class CacheFile:
    """A cache file that has been opened: its tensors are views of the file, read when they are first touched.

    Attributes:
        path: of the file, which must stay as it is while a cache uses it; replacing it by another file is no harm.
        header: its metadata.
        tensors: everything else, by name.
    """

    path: Path
    header: CacheHeader
    tensors: dict[str, Tensor]

    @classmethod
    @lasting
    def open(cls, path: Path) -> CacheFile:
        """Open a file. Raises CacheError if it is missing, cut short, damaged, or of another format."""
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                found = (file.metadata() or {}).get("kvmix")
                tensors = {} if found is None else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise CacheError(f"there is no cache file {path}; save one with --save-cache of kvmix run") from error
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CacheError(f"cannot read cache file {path}: cut short, or of another format") from error
        if found is None or f'"{FORMAT}"' not in found:
            raise CacheError(f"{path} is no cache file of the format {FORMAT}; save one with --save-cache of kvmix run")
        try:
            header = CacheHeader.model_validate_json(found)
        except ValidationError as error:
            raise CacheError(f"cache file {path} is damaged: its header is incomplete; save it again") from error
        if header != header.sealed(tensors) or header.ids_sha256 != _checksum(tensors.get(IDS)):
            raise CacheError(f"cache file {path} is damaged: its checksums are wrong; save it again")
        return cls(path, header, tensors)

    @property
    def ids(self) -> Tensor:
        """Return the tokens that are held, `[B, T]`."""
        return self.tensors[IDS]

    def check_plan(self, plan: Plan) -> None:
        """Raise CacheError unless the cache was packed by this plan."""
        if self.header.plan_sha256 != plan.sha256:
            raise CacheError(
                f"cache file {self.path} was packed by another plan (checksum {self.header.plan_sha256[:12]}, and this "
                f"plan's is {plan.sha256[:12]}); give the plan that it was saved with, or save it again"
            )

    def check_model(self, plan: Plan, model: PreTrainedModel) -> None:
        """Raise CacheError unless the cache was filled by this model, in this dtype."""
        found, dtype = self.header, _name(model.dtype)
        wrong = None
        if found.config_sha256 != fingerprint(model.config):
            wrong = f"was filled by {found.model}, and this model ({plan.model.id}) has another configuration"
        elif found.dtype != dtype:
            wrong = f"was filled by a model in {found.dtype}, and this one is in {dtype}"
        elif found.weights_sha256 != weights_checksum(model):
            wrong = f"was filled by {found.model} with other weights than this model ({plan.model.id}) has"
        if wrong is not None:
            raise CacheError(f"cache file {self.path} {wrong}; load what it was saved with, or save it again")

    def fill(self, layers: Sequence[Any], plan: Plan, model: PreTrainedModel) -> None:
        """Give what the file holds to empty layers that a plan made for a model. Raises CacheError, PlanError."""
        self.check_plan(plan)
        self.check_model(plan, model)
        tensors = {name: tensor for name, tensor in self.tensors.items() if name != IDS}
        archive = Archive(str(self.path), tensors, dict(self.header.facts), True, self.header.tokens)
        _exchange(layers, archive, plan, model, self.ids.shape[0])
        if more := [*archive.tensors, *archive.facts]:
            raise archive.fault(more[0], "belongs to no layer of this plan")

    def kept(self, layers: Sequence[Any], ids: Tensor) -> int:
        """Return the number of tokens that are of use for a prompt `[B, T]`, which has at least one more.

        Args:
            layers: filled by this file.

        Raises:
            CacheError: if the prompt begins otherwise, or the layers cannot go back to its beginning.
        """
        held, advice = self.header.tokens, "save a cache of what the prompts share, or begin with an empty one"
        if self.ids.shape[0] != ids.shape[0]:
            raise CacheError(f"cache file {self.path} holds {self.ids.shape[0]} sequences, and {ids.shape[0]} are read")
        length = min(held, ids.shape[1])
        same = (self.ids[:, :length] == ids[:, :length].cpu()).all(0)
        shared = int(same.long().cumprod(0).sum())
        if shared == 0:
            raise CacheError(f"cache file {self.path} holds another text than the prompt's; {advice}")
        kept = _longest_cut(layers, min(shared, ids.shape[1] - 1), held)
        if kept == 0:
            raise CacheError(
                f"cache file {self.path}: {shared} of its {held} tokens begin the prompt, and it cannot go back to "
                f"them, as pages, tiers, sliding and recurrent layers are never taken apart; {advice}"
            )
        return kept


def save_cache(path: Path, layers: Sequence[Any], plan: Plan, model: PreTrainedModel, ids: Tensor) -> CacheHeader:
    """Write what the layers of a cache hold to a file, whole or not at all, and return its metadata.

    Args:
        layers: made by the plan and filled by the model.
        ids: the tokens that they hold, `[B, T]`.

    Raises:
        OutputError: if the file cannot be written.
        CacheError: if a layer keeps something that no file can hold.
    """
    archive = Archive(str(path), {}, {}, False, ids.shape[1])
    _exchange(layers, archive, plan, model, ids.shape[0])
    tensors = {**archive.tensors, IDS: ids.to("cpu", torch.int32)}
    header = CacheHeader(
        model=plan.model.id,
        config_sha256=fingerprint(model.config),
        weights_sha256=weights_checksum(model),
        plan_sha256=plan.sha256,
        dtype=_name(model.dtype),
        tokens=ids.shape[1],
        ids_sha256=_checksum(tensors[IDS]),
        facts=archive.facts,
    ).sealed(tensors)
    write_parts(path, _safetensors(tensors, header))
    return header


def weights_checksum(model: PreTrainedModel) -> str:
    """Return the SHA-256 of a sample of a model's weights, which tells fine-tuned models and adapters apart."""
    digest = hashlib.sha256()
    named = [(name, each) for name, each in model.named_parameters() if each.device.type != "meta"]
    for name, parameter in named[:: max(1, len(named) // SAMPLED_TENSORS)]:
        flat = parameter.detach().reshape(-1)
        numbers = flat[:: max(1, flat.numel() // SAMPLED_NUMBERS)]
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        digest.update(_bytes(numbers))
    return digest.hexdigest()


def _exchange(layers: Sequence[Any], archive: Archive, plan: Plan, model: PreTrainedModel, batch: int) -> None:
    """Let every layer give what it holds, or take it."""
    devices = _devices(model)
    for index, layer in enumerate(layers):
        device = devices.get(index, model.device)
        part = archive.part(f"layers.{index}", torch.empty(batch, 0, 0, 0, dtype=model.dtype, device=device))
        if isinstance(layer, MixedLayer):
            heads, dtype = plan.model.heads(index), part.dtype("dtype", getattr(layer, "dtype", None) or model.dtype)
            shapes = ((batch, heads.kv_heads, 0, dim) for dim in (heads.key_dim, heads.value_dim))
            key, value = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
            layer.exchange(part, (key, value))
        else:
            exchange_stock(layer, part)


def _devices(model: PreTrainedModel) -> dict[int, torch.device]:
    """Return the device of each decoder layer, by its index; of layers that are not in memory now, none."""
    found: dict[int, torch.device] = {}
    for name, parameter in model.get_decoder().named_parameters():
        index = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        if index is not None and parameter.device.type != "meta":
            found.setdefault(index, parameter.device)
    return found


def _longest_cut(layers: Sequence[Any], tokens: int, held: int) -> int:
    """Return the longest length, at most `tokens`, that all layers of `held` tokens can be cropped to; or 0."""
    while tokens and (shorter := min(_cut(layer, tokens, held) for layer in layers)) < tokens:
        tokens = shorter
    return tokens


def _cut(layer: Any, tokens: int, held: int) -> int:
    return layer.cut(tokens) if isinstance(layer, MixedLayer) else stock_cut(layer, tokens, held)


def _safetensors(tensors: Mapping[str, Tensor], header: CacheHeader) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file part by part, so that no second copy of all tensors is made."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    forms = {name: (_DTYPES[each.dtype], each.shape, each.nbytes) for name, each in ordered.items()}
    yield safetensors_head(forms, {"kvmix": header.model_dump_json()})
    for tensor in ordered.values():
        yield _bytes(tensor)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(ids: Tensor | None) -> str:
    return "" if ids is None else hashlib.sha256(f"{list(ids.shape)}".encode() + _bytes(ids)).hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
