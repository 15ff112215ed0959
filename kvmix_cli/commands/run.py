"""`kvmix run`: generate with the quantized cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from .. import console
from ..counting import counted
from .options import CommonOptions, LoadingOptions, ModelOptions, expand, refuse, say_unused
from .run_options import CacheOptions, FillingOptions, PromptOptions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache

    from ..cache.subject import Subject
    from ..decoding.generate import Generation
    from ..decoding.prompt_cache import PromptFiles
    from ..models.loading import LoadedModel
    from ..studies.selection import Choice


@expand
def run(
    ctx: typer.Context,
    prompt: PromptOptions,
    storage: CacheOptions,
    filling: FillingOptions,
    which: ModelOptions,
    loading: LoadingOptions,
    common: CommonOptions,
) -> None:
    """Generate with the quantized cache; then say how fast it was and what the cache took."""
    if storage.baseline:
        refuse(filling.of_files, "needs a plan: the unquantized cache is not packed")
    if prompt.image:
        refuse({**filling.of_files, "prefill_chunk": filling.prefill_chunk}, "is for prompts without images")
    if prompt.temperature == 0:
        say_unused(ctx, ["top_p", "seed"], "is for sampling, with a --temperature above 0")
    if storage.baseline:
        say_unused(ctx, ["plan"], "only names the model: with --baseline the cache is unquantized")
    text, images = _read(prompt)
    choice, subject = _chosen(storage, which, loading)
    from ..decoding.generate import generate, room
    from ..decoding.prompt_cache import PromptFiles
    from ..decoding.settings import reserve
    from ..texts.prompts import check_length

    files = PromptFiles(filling.load_cache, filling.save_cache)
    files.check(subject.plan)
    loaded = loading.load(choice.model, choice.revision, reads_images=bool(images))
    loaded = replace(loaded, prefill_chunk=filling.prefill_chunk)
    check_length(loaded.tokenizer, text, loaded.max_length)
    ids, inputs = _prompt(loaded, text, images, chat=prompt.chat)
    allowed = min(prompt.max_new_tokens, room(len(ids), loaded.max_length))
    if allowed < prompt.max_new_tokens:
        console.notice(
            f"at most {counted(allowed, 'new token')}: the model's limit is {loaded.max_length}, prompt included"
        )
    cache = files.cache(subject, loaded, ids, reserve(len(ids), allowed))
    generation = generate(
        loaded,
        ids,
        cache,
        max_new_tokens=allowed,
        temperature=prompt.temperature,
        top_p=prompt.top_p,
        seed=loading.seed,
        on_text=console.text,
        inputs=inputs,
        on_prompt=files.saving(cache, loaded, ids),
    )
    console.text("\n" if common.quiet else "\n\n")
    _show(loaded, subject, cache, generation, files, quiet=common.quiet)


def _chosen(storage: CacheOptions, which: ModelOptions, loading: LoadingOptions) -> tuple[Choice, Subject]:
    """Return which model is meant, and its cache. Raises KvmixError."""
    from ..studies.selection import check_widths, choose

    uniform = [] if storage.uniform is None else [storage.uniform]
    check_widths(uniform)
    choice = choose(
        [storage.plan] if storage.plan else [],
        [storage.preset] if storage.preset else [],
        model=which.model,
        revision=which.revision,
        need_plan=not (storage.baseline or storage.preset or uniform),
        say=console.notice,
    )
    from ..cache.subject import Subject  # which loads torch
    from ..models.loading import load_info

    if storage.baseline:
        return choice, Subject()
    info = load_info(choice.model, revision=choice.revision, trust_remote_code=loading.trust_remote_code)
    name, plan = list(choice.plans(info, uniform, console.notice, encode=storage.encode).items())[-1]
    return choice, Subject(name, plan)


def _read(prompt: PromptOptions) -> tuple[str, list[Any]]:
    """Return a prompt's text and images, read before any model is. Raises TextError."""
    from ..texts.prompts import check_not_empty, read_prompt

    text = check_not_empty(prompt.prompt or "" if prompt.prompt_file is None else read_prompt(prompt.prompt_file))
    if not prompt.image:
        return text, []
    from ..texts.images import read_images  # which loads torch

    return text, read_images(prompt.image)


def _prompt(
    loaded: LoadedModel, text: str, images: Sequence[Any], *, chat: bool
) -> tuple[list[int], Mapping[str, Tensor]]:
    """Return the prompt's ids, and what the model reads of images beside them. Raises TextError."""
    from ..texts.chat import chat_ids, prompt_ids
    from ..texts.images import image_prompt

    if images:
        return image_prompt(loaded.processor, text, images, loaded.info.id)
    return chat_ids(loaded.tokenizer, text, loaded.info.id) if chat else prompt_ids(loaded.tokenizer, text), {}


def _show(
    loaded: LoadedModel, subject: Subject, cache: Cache, generation: Generation, files: PromptFiles, *, quiet: bool
) -> None:
    """Show how fast it was and what the cache took, and what part of the model the plan is of."""
    from ..decoding.footprint import full_context, measure_footprint
    from ..reporting.tables.generation import generation_json, generation_table
    from ..reporting.words import layers_json, layers_text

    plan = subject.plan
    footprint = measure_footprint(cache, plan, loaded.model.dtype.itemsize)
    whole = full_context(plan, loaded)
    if not quiet:
        console.table(*generation_table(subject.name, generation, footprint, whole, files))
        if plan is not None and (layers := layers_text(loaded.info, plan)):
            console.notice(layers)
    if footprint.quantized_share == 0 and plan is not None:
        console.alert("nothing was quantized: sink, window and page held all tokens; this was the unquantized model")
    more = {"layers": None if plan is None else layers_json(loaded.info, plan), **files.as_json()}
    console.emit_json(generation_json(loaded.info.id, subject.name, generation, footprint, whole) | more)
