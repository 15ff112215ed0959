"""Made-up codebooks of coupled channels, and profiles that have them."""

import numpy as np
from made_up import make_profile

from kvmix_cli.codecs.vectors import LEARNED_BITS, SPANS
from kvmix_cli.plan.page_codecs import PageCodecs
from kvmix_cli.plan.tensors.codebooks import Codebooks, CodebooksFile
from kvmix_cli.plan.tensors.moments import Rope

SCORE = "codebooks"


def made_up_codebooks(info, rope=None, widths=LEARNED_BITS, seed=0):
    """Codebooks of normal numbers for every layer of a model; `rope` has the frequencies of its keys."""
    draw = np.random.default_rng(seed)

    def books(heads, dim):
        sizes = ((bits, (heads, dim // SPANS[bits], 1 << bits * SPANS[bits], SPANS[bits])) for bits in widths)
        return {bits: draw.standard_normal(shape).astype(np.float16) for bits, shape in sizes}

    layers = {
        index: {"k": books(heads.kv_heads, heads.key_dim), "v": books(heads.kv_heads, heads.value_dim)}
        for index in info.quantizable
        for heads in [info.heads(index)]
    }
    turns = {} if rope is None else {index: Rope(np.asarray(rope, np.float64), "half", 0) for index in info.quantizable}
    return Codebooks(info.id, layers, turns)


def codecs_with(path, codebooks):
    """Save codebooks, and return the codecs of a plan that name them."""
    return PageCodecs(k="vectors", v="vectors", codebooks=str(path), sha256=codebooks.save(path))


def with_made_up_codebooks(profile, folder, name="profile.codebooks.safetensors"):
    """Return a profile with codebooks, whose file is written beside it."""
    info = profile.model
    sha256 = made_up_codebooks(info).save(folder / name)
    plain = make_profile([1.0] * len(info.quantizable), info=info, name=SCORE).scores[SCORE]
    score = plain.model_copy(update={"codebooks": CodebooksFile(file=name, sha256=sha256, tokens=100)})
    return profile.model_copy(update={"scores": {**profile.scores, SCORE: score}})
