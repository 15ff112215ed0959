"""`run_profile`: what is sampled, what is recorded, and going on after an interruption."""

import json
import random
import resource
import statistics
from dataclasses import replace

import pytest
import torch
from architectures import build
from hypothesis import given
from hypothesis import strategies as st
from profiling_models import ByteTokenizer, load, wrap
from ranking import together

from kvmix_cli.errors import DocumentError, KvmixError, ModelError, OutputError, StateError, TextError
from kvmix_cli.profile import Profile
from kvmix_cli.profiling import PROBES, ChangeProbe, ProbeOptions, describe_samples, profile_lock, run_profile
from kvmix_cli.profiling.measure import shared_pass
from kvmix_cli.profiling.probes.grad_norm import GradNorm
from kvmix_cli.ranks import Ranks
from kvmix_cli.texts import load_texts, prose
from kvmix_cli.texts.tokens import MIN_TOKENS, cut_samples, spread

TEXTS = [f"document {number}: " + "".join(chr(97 + number * i % 26) for i in range(300)) for number in range(1, 8)]
RUN = {"texts": TEXTS, "source": "test", "samples": 5, "seq_len": 40, "seed": 3}


@pytest.fixture
def loaded():
    return load("llama")


# Samples


def test_samples_are_whole_pieces_of_the_text(loaded):
    samples = cut_samples(loaded.tokenizer, TEXTS, 10, 40, seed=0)
    documents = [loaded.tokenizer(text)["input_ids"] for text in TEXTS]
    pieces = [ids[start : start + 40] for ids in documents for start in range(0, len(ids), 40)]
    assert len(samples) == 10
    assert all(len(sample) == 40 and sample in pieces for sample in samples)
    assert len({tuple(sample) for sample in samples}) == 10


def test_the_seed_chooses(loaded):
    first, again, other = (cut_samples(loaded.tokenizer, TEXTS, 5, 40, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_documents_take_turns_however_long_they_are(loaded):
    long = "".join(chr(97 + i * i % 26) for i in range(4000))
    texts = [long, *TEXTS]
    documents = [str(loaded.tokenizer(text)["input_ids"])[1:-1] for text in texts]

    def sources(samples):
        pieces = cut_samples(loaded.tokenizer, texts, samples, 40, seed=0)
        return [number for piece in pieces for number, ids in enumerate(documents) if str(piece)[1:-1] in ids]

    assert sorted(sources(8)) == list(range(8))
    assert sorted(sources(16)) == sorted([*range(8)] * 2)
    assert sources(16)[:8] == sources(8), "more samples begin with the same ones"


def test_half_of_the_samples_of_the_builtin_text_are_prose(loaded):
    written = [str(loaded.tokenizer(text)["input_ids"])[1:-1] for text in prose()]
    for seed in range(3):
        samples = cut_samples(loaded.tokenizer, load_texts(), 10, 1024, seed=seed)
        assert sum(any(str(piece)[1:-1] in ids for ids in written) for piece in samples) == 5


@given(count=st.integers(0, 40), seed=st.integers(0, 9))
def test_the_first_documents_are_from_all_parts_of_the_list(count, seed):
    texts = list(map(str, range(count)))
    order = spread(texts, random.Random(seed))
    assert sorted(order, key=int) == texts
    for first in range(count + 1):
        front = sum(int(text) < (count + 1) // 2 for text in order[:first])
        assert min(first // 2, count // 2) <= front <= -(-first // 2)


def test_a_start_token_begins_every_sample():
    samples = cut_samples(load("llama", bos=True).tokenizer, TEXTS, 10, 40, seed=0)
    assert all(len(sample) == 40 and sample[0] == 1 and 1 not in sample[1:] for sample in samples)


def test_too_little_text_is_used_up_and_counted(loaded):
    profile = run_profile(loaded, **{**RUN, "texts": TEXTS[:1], "samples": 30})
    tokens = len(loaded.tokenizer(TEXTS[0])["input_ids"])
    pieces = [min(40, tokens - start) for start in range(0, tokens, 40)]
    kept = [piece for piece in pieces if piece >= MIN_TOKENS]
    assert 0 < len(kept) < 30
    assert profile.score("grad-norm").calibration.samples == len(kept)
    assert profile.score("grad-norm").calibration.tokens == sum(kept)


def test_full_length_samples_come_first(loaded):
    texts = ["x" * 35] * 50 + ["y" * 64]
    assert [len(sample) for sample in cut_samples(loaded.tokenizer, texts, 3, 64, seed=0)] == [64, 35, 35]


@pytest.mark.parametrize("texts", [[], [""], ["a few words"] * 100])
def test_no_sample_at_all_is_an_error(loaded, texts):
    with pytest.raises(TextError, match="at least 32 tokens"):
        cut_samples(loaded.tokenizer, texts, 3, 64, seed=0)


def test_of_a_long_document_no_more_is_tokenized_than_samples_take(loaded):
    seen = []

    def counting(text, **options):
        seen.append(text)
        return loaded.tokenizer(text, **options)

    counting.bos_token_id = loaded.tokenizer.bos_token_id
    text = "".join(f"line {number} of a long text\n" for number in range(60_000))
    four, eight = (cut_samples(counting, [text], samples, 64, seed=0) for samples in (4, 8))
    assert [len(sample) for sample in eight] == [64] * 8
    assert eight[:4] == four, "more samples begin with the same ones"
    assert sum(map(len, seen)) < len(text) / 2
    places = [text.index(part) for part in seen[1:65]]
    assert places == [len(text) * number // 64 for number in range(64)]


def test_a_sample_longer_than_the_model_is_an_error(loaded):
    assert cut_samples(loaded.tokenizer, TEXTS, 1, 128, seed=0, max_length=128)
    with pytest.raises(TextError, match="at most 128 tokens, not 129: use a smaller --seq-len"):
        cut_samples(loaded.tokenizer, TEXTS, 1, 129, seed=0, max_length=128)


@pytest.mark.parametrize(("samples", "seq_len"), [(0, 40), (3, 1)])
def test_no_samples_or_no_tokens_is_an_error(loaded, samples, seq_len):
    with pytest.raises(TextError, match="cannot profile"):
        cut_samples(loaded.tokenizer, TEXTS, samples, seq_len, seed=0)


def test_only_the_text_that_is_needed_is_tokenized():
    tokenizer = CountingTokenizer()
    cut_samples(tokenizer, ["z" * 400] * 1000, 2, 40, seed=0)
    assert 0 < tokenizer.calls < 20


class CountingTokenizer(ByteTokenizer):
    calls = 0

    def __call__(self, text, **options):
        self.calls += 1
        return super().__call__(text, **options)


def test_the_digest_tells_samples_apart():
    digests = {describe_samples(samples, "s", 4, 0).sha256 for samples in ([[5, 6], [7]], [[5], [6, 7]], [[5, 6, 7]])}
    assert len(digests) == 3


# The profile


def test_mean_and_spread_over_the_samples(loaded):
    profile = run_profile(loaded, **RUN)
    samples = [torch.tensor([ids]) for ids in cut_samples(loaded.tokenizer, TEXTS, 5, 40, seed=3)]
    norms = [shared_pass(loaded, [GradNorm()], ids)["grad-norm"].layers for ids in samples]
    for index, layer in profile.score("grad-norm").layers.items():
        for kind in ("k", "v"):
            values = [getattr(sample[index], kind).value for sample in norms]
            assert getattr(layer, kind).mean == pytest.approx(statistics.mean(values))
            assert getattr(layer, kind).std == pytest.approx(statistics.stdev(values))


def test_one_sample_has_no_spread(loaded):
    profile = run_profile(loaded, **{**RUN, "samples": 1})
    assert all(layer.k.std == layer.v.std == 0 for layer in profile.score("grad-norm").layers.values())


def test_the_profile_says_what_was_profiled(loaded, tmp_path):
    profile = run_profile(loaded, **RUN)
    assert profile.model == loaded.info
    assert profile.provenance["dtype"] == "float32"
    text = profile.score("grad-norm").calibration
    assert (text.source, text.samples, text.tokens) == ("test", 5, 200)
    assert Profile.load(profile.save(tmp_path / "profile.yaml")).score("grad-norm").calibration == text


def test_only_layers_that_can_be_quantized_are_scored(loaded):
    info = loaded.info.model_copy(update={"stock": {1: "sliding_attention"}})
    sliding = type(loaded)(loaded.model, loaded.tokenizer, info, loaded.max_length)
    assert list(run_profile(sliding, **RUN).score("grad-norm").layers) == [0, 2]


def test_progress_is_told(loaded):
    steps = []
    run_profile(loaded, **RUN, on_step=lambda done, total: steps.append((done, total)))
    assert steps == [(done, 5) for done in range(6)]


def test_probes_by_name(loaded):
    assert [PROBES[name].name for name in PROBES] == list(PROBES)
    with pytest.raises(KvmixError, match=r"unknown score 'grad_norm' \(did you mean 'grad-norm'\?\)"):
        run_profile(loaded, ["grad_norm"], **RUN)


# Several scores

LONG = {**RUN, "texts": [text * 10 for text in TEXTS], "samples": 2, "seq_len": 280}
NARROW = ProbeOptions(bits=(2, 4), group_sizes=(16, 64))


def larger():
    """With heads that can be packed, and room for enough tokens that some are."""
    return wrap(build("llama", torch.float32))


@pytest.mark.slow
def test_several_scores_in_one_profile(tmp_path):
    profile = run_profile(larger(), ["fisher", "grad-norm", "error", "kl"], **LONG, options=NARROW)
    assert list(profile.scores) == ["fisher", "grad-norm", "error", "kl"]
    units = [score.unit for score in profile.scores.values()]
    assert units == ["nats", "gradient norm", "relative error", "nats"]
    assert [score.predicts_loss for score in profile.scores.values()] == [True, False, False, True]
    for name in ("fisher", "error", "kl"):
        score = profile.score(name)
        assert score.choices == (["2g16", "2g64", "4g16", "4g64"], ["2g16", "4g16"])
        assert score.setup == {"page": 128, "sink": 4, "window": "recent:128", "scale_dtype": "float16"}
        for layer in score.layers.values():
            assert layer.k.mean == layer.k.curve["2g64"] > layer.k.curve["4g64"] > 0
            assert layer.v.mean == layer.v.curve["2g16"] > layer.v.curve["4g16"] > 0
            assert layer.k.std > 0
    assert profile.score("grad-norm").choices == ([], [])
    assert Profile.load(profile.save(tmp_path / "profile.yaml")).scores.keys() == profile.scores.keys()


def test_a_curve_is_the_mean_over_samples():
    loaded = larger()
    profile = run_profile(loaded, ["error"], **LONG, options=NARROW)
    grid = replace(ChangeProbe.grid, bits=(2, 4), group_sizes=(16, 64))
    samples = [
        torch.tensor([ids]) for ids in cut_samples(loaded.tokenizer, LONG["texts"], 2, 280, 3, shortest=grid.shortest)
    ]
    alone = [shared_pass(loaded, [PROBES["error"]()], ids, grid)["error"].layers for ids in samples]
    for index, layer in profile.score("error").layers.items():
        for choice, mean in layer.k.curve.items():
            assert mean == pytest.approx(statistics.mean(sample[index].k.curve[choice] for sample in alone))


def test_scores_of_heads():
    profile = run_profile(larger(), ["grad-norm", "taylor"], **LONG, options=replace(NARROW, per_head=True))
    heads = [
        tensor.heads
        for score in profile.scores.values()
        for layer in score.layers.values()
        for tensor in (layer.k, layer.v)
    ]
    assert all(len(each) == 2 and min(each) > 0 for each in heads)


def test_a_probe_of_ones_own(loaded):
    class Largest(GradNorm):
        name = "largest"

        def score(self, gradient):
            return gradient.abs().max()

    profile = run_profile(loaded, ["grad-norm", Largest()], **RUN)
    for norm, largest in zip(*(score.layers.values() for score in profile.scores.values()), strict=True):
        assert 0 < largest.k.mean < norm.k.mean


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (
            ["grad-norm"],
            {"bits": (2,)},
            "score grad-norm does not look at widths; leave out --bits, --group-size and --encode",
        ),
        (["taylor"], {"bits": (2, 5)}, "5 bits is no width of a cache; choose from 1, 2, 3, 4, 8"),
        (["taylor"], {"bits": (16,)}, "16 bits is no width of a cache"),
        (["taylor"], {"group_sizes": (4,)}, "must be a number of at least 8 or 'row', got 4"),
        (["error", "loss"], {"checkpointing": True}, "score error, loss has no backward pass"),
        (["taylor"], {"frame": 256}, "score taylor has no frames; use --score fisher-metric, or leave out --frame"),
        (["taylor", "loss"], {"per_head": True}, "score loss has no scores per head"),
    ],
)
def test_options_that_make_no_sense_are_errors(scores, options, message):
    with pytest.raises(KvmixError, match=message):
        run_profile(larger(), scores, **LONG, options=ProbeOptions(**options))


def test_samples_too_short_to_read_anything_packed():
    with pytest.raises(TextError, match=r"in 261 tokens nothing is read .* a --seq-len of 262 or more"):
        run_profile(larger(), ["grad-norm", "error"], **{**LONG, "seq_len": 261})
    with pytest.raises(TextError, match="no calibration text of at least 262 tokens"):
        run_profile(larger(), ["error"], **{**LONG, "texts": [text[:250] for text in TEXTS]})
    shortest = run_profile(larger(), ["error"], **{**LONG, "seq_len": 262, "samples": 1}, options=NARROW)
    assert all(layer.k.mean > 0 for layer in shortest.score("error").layers.values())


# The journal


class Interrupted(Exception):
    pass


def interrupt_after(samples):
    def on_step(done, total):
        if done == samples:
            raise Interrupted

    return on_step


def interrupted(loaded, journal, after, **changes):
    with pytest.raises(Interrupted):
        run_profile(loaded, **{**RUN, **changes}, journal=journal, on_step=interrupt_after(after))


def measured(profile):
    """All of a profile but how long it took."""
    return profile.model_dump(exclude={"scores": {name: {"seconds"} for name in profile.scores}})


@pytest.mark.parametrize("after", [0, 1, 4, 5])
def test_resuming_equals_an_uninterrupted_run(loaded, tmp_path, after):
    expected, journal = run_profile(loaded, **RUN), tmp_path / "profile.partial.jsonl"
    interrupted(loaded, journal, after)
    steps = []
    resumed = run_profile(
        load("llama"), **RUN, journal=journal, resume=True, on_step=lambda done, _: steps.append(done)
    )
    assert measured(resumed) == measured(expected)
    assert steps == list(range(after, 6)), "a finished sample was measured again"


@pytest.mark.slow
def test_several_scores_resume_together(tmp_path):
    scores, journal = ["taylor", "fisher", "loss"], tmp_path / "profile.partial.jsonl"
    expected = run_profile(larger(), scores, **LONG, options=NARROW)
    with pytest.raises(Interrupted):
        run_profile(larger(), scores, **LONG, options=NARROW, journal=journal, on_step=interrupt_after(1))
    for changed in (["taylor", "fisher"], ["fisher", "taylor", "loss"]):
        with pytest.raises(DocumentError, match="scores was"):
            run_profile(larger(), changed, **LONG, options=NARROW, journal=journal, resume=True)
    with pytest.raises(DocumentError, match=r"bits was \[2, 4\] and is now \[2\]"):
        run_profile(larger(), scores, **LONG, options=replace(NARROW, bits=(2,)), journal=journal, resume=True)
    steps = []
    resumed = run_profile(
        larger(), scores, **LONG, options=NARROW, journal=journal, resume=True, on_step=lambda *step: steps.append(step)
    )
    assert measured(resumed) == measured(expected)
    assert steps == [(1, 2), (2, 2)]


def test_a_cut_off_last_line_costs_that_sample(loaded, tmp_path):
    expected, journal = run_profile(loaded, **RUN), tmp_path / "profile.partial.jsonl"
    interrupted(loaded, journal, 3)
    journal.write_text(journal.read_text()[:-20])
    steps = []
    resumed = run_profile(loaded, **RUN, journal=journal, resume=True, on_step=lambda done, _: steps.append(done))
    assert measured(resumed) == measured(expected)
    assert steps[0] == 2
    assert [len(json.loads(line)) for line in journal.read_text().splitlines()[1:]] == [1] * 5


def test_resume_without_a_journal_starts(loaded, tmp_path):
    profile = run_profile(loaded, **RUN, journal=tmp_path / "deep" / "profile.partial.jsonl", resume=True)
    assert measured(profile) == measured(run_profile(loaded, **RUN))


def test_without_resume_an_old_journal_is_replaced(loaded, tmp_path):
    journal = tmp_path / "profile.partial.jsonl"
    interrupted(loaded, journal, 3, seed=9)
    assert measured(run_profile(loaded, **RUN, journal=journal)) == measured(run_profile(loaded, **RUN))


@pytest.mark.parametrize(
    "changes", [{"seed": 4}, {"samples": 6}, {"seq_len": 41}, {"source": "other"}, {"texts": TEXTS[1:]}]
)
def test_other_settings_cannot_be_resumed(loaded, tmp_path, changes):
    journal = tmp_path / "profile.partial.jsonl"
    interrupted(loaded, journal, 2)
    before = journal.read_text()
    with pytest.raises(DocumentError, match=r"was .* and is now .*; leave out --resume") as error:
        run_profile(loaded, **{**RUN, **changes}, journal=journal, resume=True)
    assert "\n" not in str(error.value)
    assert journal.read_text() == before


def test_another_model_cannot_be_resumed(loaded, tmp_path):
    journal = tmp_path / "profile.partial.jsonl"
    interrupted(loaded, journal, 2)
    with pytest.raises(DocumentError, match="config_sha256 was"):
        run_profile(load("qwen3"), **RUN, journal=journal, resume=True)
    with pytest.raises(DocumentError, match='dtype was "float32" and is now "float64"'):
        run_profile(load("llama", torch.float64), **RUN, journal=journal, resume=True)


@pytest.mark.parametrize("damage", ["", "garbage\n", "[]\n", '{"format": "other"}\n', "\xff\xfe"])
def test_a_foreign_journal_cannot_be_resumed(loaded, tmp_path, damage):
    journal = tmp_path / "profile.partial.jsonl"
    journal.write_bytes(damage.encode("latin-1"))
    with pytest.raises(DocumentError, match="cannot resume from this file"):
        run_profile(loaded, **RUN, journal=journal, resume=True)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"seconds": 1}',
        '{"grad-norm": {"seconds": 1, "layers": {"0": 3}}}',
        '{"loss": {"seconds": 1, "layers": {}}}',
        '{"grad-norm": {"seconds": 1, "layers": {}}}',
        '{"grad-norm": ' + "[" * 10_000 + "]" * 10_000 + "}",
        '{"grad-norm": {"seconds": 1e999, "layers": {}}}',
        "null",
        "\xff",
    ],
)
def test_a_damaged_journal_cannot_be_resumed(loaded, tmp_path, line):
    journal = tmp_path / "profile.partial.jsonl"
    interrupted(loaded, journal, 2)
    header, _, second = journal.read_text().splitlines()
    journal.write_text("\n".join([header, line, second, ""]))
    with pytest.raises(DocumentError, match="line 2 is damaged"):
        run_profile(loaded, **RUN, journal=journal, resume=True)


RESULT = {"value": 1.0, "curve": {}, "heads": []}


@pytest.mark.parametrize(
    "tensor",
    [
        {**RESULT, "value": "1"},
        {**RESULT, "value": float("nan")},
        {**RESULT, "value": None},
        {**RESULT, "curve": {"2g64": 1.0}},
        {**RESULT, "heads": [1.0]},
        {**RESULT, "heads": 1.0},
        {**RESULT, "more": 1.0},
        [1.0],
        {},
    ],
)
def test_a_record_of_wrong_types_cannot_be_resumed(loaded, tmp_path, tensor):
    journal = tmp_path / "profile.partial.jsonl"
    interrupted(loaded, journal, 2)
    header, first, _ = journal.read_text().splitlines()
    record = json.loads(first)
    record["grad-norm"]["layers"]["1"][1] = tensor
    journal.write_text("\n".join([header, json.dumps(record), ""]))
    with pytest.raises(DocumentError, match="line 2 is damaged") as error:
        run_profile(loaded, **RUN, journal=journal, resume=True)
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_be_scored_leaves_no_journal(tmp_path):
    journal = tmp_path / "profile.partial.jsonl"
    with pytest.raises(ModelError, match="computes attention on its own"):
        run_profile(wrap(build("falcon", torch.float32)), ["error"], **LONG, options=NARROW, journal=journal)
    assert not list(tmp_path.iterdir())


def test_a_journal_with_too_many_samples_cannot_be_resumed(loaded, tmp_path):
    journal = tmp_path / "profile.partial.jsonl"
    interrupted(loaded, journal, 5)
    journal.write_text(journal.read_text() + journal.read_text().splitlines()[-1] + "\n")
    with pytest.raises(DocumentError, match="it has 6 samples, more than 5"):
        run_profile(loaded, **RUN, journal=journal, resume=True)


def test_a_journal_in_use_is_refused_by_name(loaded, tmp_path):
    journal = tmp_path / "profile.partial.jsonl"

    def second(done, total):
        with pytest.raises(StateError, match=f"another process is writing {journal}"):
            run_profile(loaded, **RUN, journal=journal)

    run_profile(loaded, **RUN, journal=journal, on_step=second)


def test_a_profile_is_measured_for_by_one_process_at_a_time(tmp_path):
    path = tmp_path / "deep" / "er" / "profile.yaml"
    with profile_lock(path):
        with pytest.raises(StateError, match=f"another process is writing {path}"), profile_lock(path):
            pass
        with profile_lock(tmp_path / "other.yaml"):
            pass
    assert not list(tmp_path.iterdir()), "no lock and no empty folder stays"
    with profile_lock(path):
        path.write_text("saved")
    assert [each.name for each in path.parent.iterdir()] == ["profile.yaml"]


def test_a_place_that_cannot_be_written_is_known_before_the_work(loaded, tmp_path):
    (tmp_path / "file").write_text("")
    steps = []
    with pytest.raises(OutputError, match="cannot write"):
        run_profile(loaded, **RUN, journal=tmp_path / "file" / "journal", on_step=lambda *step: steps.append(step))
    assert not steps


def test_a_full_disk_keeps_what_is_there(loaded, tmp_path):
    """The journal of the finished samples stays usable."""
    journal = tmp_path / "profile.partial.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(done, total):
        if done == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (journal.stat().st_size + 10, limits[1]))

    try:
        with pytest.raises(OutputError, match="--resume"):
            run_profile(loaded, **RUN, journal=journal, on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert measured(run_profile(loaded, **RUN, journal=journal, resume=True)) == measured(run_profile(loaded, **RUN))


# Ranks


def test_ranks_share_the_samples_and_come_to_the_same_profile(tmp_path):
    alone = run_profile(load("llama"), **RUN, journal=tmp_path / "alone.jsonl")
    models = [load("llama") for _ in range(2)]

    def work(ranks):
        steps = []
        loaded = replace(models[ranks.rank], ranks=ranks)
        path = tmp_path / f"{ranks.rank}.jsonl"
        profile = run_profile(loaded, **RUN, journal=path, on_step=lambda done, total: steps.append(done))
        return profile, steps, path.exists()

    (leaders, steps, is_kept), (others, own_steps, is_kept_twice) = together(work)
    assert (steps, own_steps) == ([0, 1, 2, 3, 4, 5], [0])
    assert is_kept and not is_kept_twice
    assert leaders == others
    assert leaders.outliers == alone.outliers, "of the rank that has a sample less"
    for index, layer in alone.score("grad-norm").layers.items():
        assert leaders.score("grad-norm").layers[index].k.mean == pytest.approx(layer.k.mean, rel=1e-5)
    journals = [(tmp_path / name).read_text().splitlines() for name in ("alone.jsonl", "0.jsonl")]
    assert len(journals[0]) == len(journals[1]) == 6


def test_scores_that_look_at_all_heads_are_refused_where_a_rank_has_some(loaded):
    part = replace(loaded, ranks=Ranks(0, 2, is_sharded=True))
    with pytest.raises(KvmixError, match=r"score taylor looks at all heads of a layer.* use grad-norm, loss or kl"):
        run_profile(part, ["grad-norm", "taylor"], **RUN)
