"""The built-in model's training script: what it may read, and the exercises it makes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from kvmix_cli.assets.tiny import train
from kvmix_cli.texts import CALIBRATION_MODULES, load_texts, module_sources, reference_topics


@pytest.fixture
def data():
    tokenizer = Tokenizer.from_file(str(Path(train.__file__).with_name("tokenizer.json")))
    tokens = train.encode(tokenizer, ["some filler text, nothing else\n" * 400])
    return train.Data(tokenizer, tokens, tokens)


@pytest.mark.slow
def test_held_out_text_is_not_trained_on(monkeypatch):
    monkeypatch.setattr(train, "SHARES", {})
    monkeypatch.setattr(train, "PROSE", ())
    training = set(train.collect())
    assert len(training) > 500
    assert not training & set(load_texts(held_out=True))
    own = [*reference_topics(held_out=False), *(text for name in CALIBRATION_MODULES for text in module_sources(name))]
    assert set(own) <= training
    joined = "\n\n".join(load_texts("builtin-library"))
    assert all(text in joined for text in own)
    assert len(joined) == len("\n\n".join(own)), "the built-in text without prose is the model's own training text"


def test_exercises_ask_for_what_they_told(data):
    for length in (512, 2048):
        ids = data.exercise(length)
        assert len(ids) == length
        assert ids[0] == train.BOS
        text = data.tokenizer.decode(ids[:-12])
        told = dict(line.split(" = ") for line in text.splitlines() if " = " in line)
        asked = [line.removeprefix("assert ").split(" == ") for line in text.splitlines() if line.startswith("assert ")]
        assert 2 <= len(told) <= 14
        assert asked
        assert all(told[name] == value for name, value in asked if len(value) == 4)


def test_batches(data):
    batch = data.batch(64, 3)
    assert batch.shape == (3, 64)
    assert all(0 <= token < train.VOCABULARY for token in batch.flatten().tolist())


def test_recall_is_counted(data):
    """A model that copies the answer from the input is always right; one that says nothing never is."""

    class Answering(torch.nn.Module):
        def __init__(self, right):
            super().__init__()
            self.right = right

        def forward(self, input_ids):
            answers = input_ids.roll(-1, dims=1) if self.right else torch.zeros_like(input_ids)
            logits = torch.nn.functional.one_hot(answers, train.VOCABULARY).float()
            return type("Output", (), {"logits": logits})

    right, total = train.recalled(Answering(True), data, exercises=2)
    assert right == total > 0
    assert train.recalled(Answering(False), data, exercises=2) == (0, total)


def test_the_learning_rate():
    assert train.rate(0, 0.0) == pytest.approx(1 / train.WARM_UP_STEPS)
    assert train.rate(1000, 0.2) == 1
    falling = [train.rate(1000, spent) for spent in np.linspace(train.DECAY_FROM, 1, 20)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == train.FLOOR
