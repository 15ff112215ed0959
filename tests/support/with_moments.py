"""Profiles with made-up moments of keys and values, in memory and in files."""

import numpy as np
from made_up import make_profile

from kvmix_cli.plan.tensors.moments import LayerMoments, MomentsFile, TensorMoments, write_moments
from kvmix_cli.profile import CodedLoss, Profile
from kvmix_cli.state import moments_path

SCORE = "fisher-metric"
HEADS, DIM = 3, 8


def random_metric(seed, rank=DIM):
    """Return [H, D, D] of a rank, with eigenvalues over three decades."""
    factors = np.random.default_rng(seed).normal(size=(HEADS, DIM, rank)) * np.geomspace(1, 1e-1, rank)
    return factors @ factors.transpose(0, 2, 1)


def tensor_moments(random, heads, dim):
    """Moments of one tensor with eigenvalues over several orders of magnitude, as real heads have."""
    basis = np.linalg.qr(random.standard_normal((heads, dim, dim)))[0]
    metric, covariance = (
        basis * np.exp(random.normal(mean, 3, (heads, 1, dim))) @ basis.transpose(0, 2, 1) for mean in (-9, -3)
    )
    return TensorMoments(metric, covariance, random.standard_normal((heads, dim)))


def layer_moments(random, heads, dim):
    return LayerMoments(tensor_moments(random, heads, dim), tensor_moments(random, heads, dim), None)


def model_moments(info, seed=0):
    random = np.random.default_rng(seed)
    return {index: layer_moments(random, info.kv_heads, info.head_dim) for index in info.quantizable}


def profile_with_moments(info, sha256="0" * 64, scores=None, setup=None):
    """A profile with the record of a file of moments, beside other scores."""
    plain = make_profile([1.0] * len(info.quantizable), info=info, name=SCORE)
    record = MomentsFile(file="profile.safetensors", sha256=sha256, documents=2, predictions=100, tokens=900)
    score = plain.scores[SCORE].model_copy(update={"moments": record, "setup": setup or {}})
    return Profile(model=info, scores={**(scores or {}), SCORE: score})


def with_coded(profile, ratios, context=None):
    """The profile with measured losses of transform codes, `ratios` times what moments promise, by exact tokens.

    Losses of other contexts stay.
    """
    coded = [
        CodedLoss(bits=2, exact=exact, context=context, predicted=1e-3, measured=1e-3 * ratio)
        for exact, ratio in ratios.items()
    ]
    before = profile.score(SCORE)
    score = before.model_copy(update={"coded": [*before.coded, *coded]})
    return profile.model_copy(update={"scores": {**profile.scores, SCORE: score}})


def save_with_moments(path, info, scores=None, seed=0, setup=None):
    """Save a profile and the file of its moments, and return the profile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sha256 = write_moments(moments_path(path), model_moments(info, seed))
    profile = profile_with_moments(info, sha256, scores, setup)
    profile.save(path)
    return profile
