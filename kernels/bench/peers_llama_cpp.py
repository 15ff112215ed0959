"""llama.cpp as a peer of bench_peers_cpu.py: its own cache types, read by its own flash attention.

Built from the source that its Python package carries (`pip install llama-cpp-python`), for the machine it runs on.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from peers import HerePeer
from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
from gguf_files import write_llama

KINDS = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}
BATCH = 2048
"""Tokens of a prompt that are given to llama.cpp at a time, its own default."""
PIECE = 256
"""Tokens that are read once, and copied to fill a cache; 16K are 64 copies, and llama.cpp holds 256 sequences."""


class LlamaCppPeer(HerePeer):
    """A llama.cpp context whose keys and values have one type.

    Args:
        path: GGUF file of the weights.
        kind: a name of `KINDS`.
        room: tokens that it will hold at most.
        threads: for prompts and for decoding.
    """

    def __init__(self, path: Path, kind: str, room: int, threads: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = room + PIECE
        params.n_batch = BATCH
        params.n_seq_max = room // PIECE + 2
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KINDS[kind]
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._model = _load(path)
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context of {room} tokens with {kind} keys and values")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def read(self, ids: Sequence[int]) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)
        for start in range(0, len(ids), BATCH):
            self._decode(ids[start : start + BATCH])
        self._logits()

    def fill(self, tokens: int) -> None:
        """Put copies of the keys and values of one random piece into the cache, each at its own positions.

        Keys are rotated to their positions at the first step, which is not timed.
        """
        ids = torch.randint(self._vocabulary, (PIECE,), generator=torch.Generator().manual_seed(0)).tolist()
        self.read(ids)
        size = llama_cpp.llama_state_seq_get_size(self._context, 0)
        state = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(self._context, state, size, 0)
        for copy, start in enumerate(range(PIECE, tokens, PIECE), start=1):
            if not llama_cpp.llama_state_seq_set_data(self._context, state, size, copy):
                raise SystemExit("llama.cpp cannot copy its cache")
            llama_cpp.llama_memory_seq_rm(self._memory, copy, tokens - start, -1)
            llama_cpp.llama_memory_seq_add(self._memory, copy, 0, -1, start)
            llama_cpp.llama_memory_seq_cp(self._memory, copy, 0, -1, -1)
            llama_cpp.llama_memory_seq_rm(self._memory, copy, -1, -1)

    def step(self, token: int) -> Tensor:
        self._decode([token])
        return self._logits()

    @property
    def nbytes(self) -> int:
        """Return the bytes of the cache as llama.cpp would write it to a file, positions included."""
        return int(llama_cpp.llama_state_seq_get_size(self._context, 0))

    def _decode(self, ids: Sequence[int]) -> None:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)  # a batch does not keep it
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
        if code := llama_cpp.llama_decode(self._context, batch):
            raise SystemExit(f"llama.cpp cannot decode {len(ids)} tokens: code {code}")

    def _logits(self) -> Tensor:
        pointer = llama_cpp.llama_get_logits_ith(self._context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, (self._vocabulary,)).copy())


def write_weights(model: PreTrainedModel, path: Path) -> None:
    """Write a model's weights for llama.cpp: the same numbers, in the same 16 bits."""
    weights = {name: weight for name, weight in model.state_dict().items() if not _is_tied(model, name)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    write_llama(part, model.config.to_dict(), weights, "BF16")
    part.rename(path)


def _is_tied(model: PreTrainedModel, name: str) -> bool:
    return name == "lm_head.weight" and bool(model.config.tie_word_embeddings)


@functools.cache
def _load(path: Path) -> Any:
    llama_cpp.llama_log_set(_unheard, None)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}: delete it, so that it is written again")
    return model


@llama_cpp.llama_log_callback
def _unheard(level: int, text: bytes, data: object) -> None:
    """Take a line of llama.cpp's log, which has hundreds for each model, and drop it."""
