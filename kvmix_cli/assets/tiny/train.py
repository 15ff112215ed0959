"""Train the built-in model anew: text, tokenizer, weights, in one run.

    python kvmix_cli/assets/tiny/train.py --out new-tiny --minutes 92

It needs nothing but this Python: the text is what an installation carries (library sources and their documentation,
the sources of installed packages), minus what `kvmix_cli.texts` holds out. One sequence in five is a recall exercise,
`name = 4821`, filler, `assert name == 4821`, so that a model this small has something to look up in its cache.
`torch.optim.Muon` needs torch 2.9.
"""

from __future__ import annotations

import argparse
import logging
import random
import sysconfig
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvmix_cli.texts import HELD_OUT_MODULES, builtin_texts, reference_topics

LIBRARY = Path(sysconfig.get_path("stdlib"))
PACKAGES = Path(sysconfig.get_path("purelib"))
SPECIAL = ("<s>", "</s>", "<pad>")
BOS, EOS, PAD = range(3)
"""Ids of the special tokens."""
VOCABULARY = 4096
CONTEXT = 4096

SHARES = {
    **dict.fromkeys(("networkx", "typer", "rich", "fsspec", "aiohttp", "pip"), 1),
    **dict.fromkeys(("numpy", "pandas"), 2),
    **{"torch": 3, "sympy": 4, "transformers": 6},
}
"""Of each installed package, one file in so many."""
PROSE = (
    (PACKAGES, "*.dist-info/METADATA"),
    (Path("/usr/share/doc"), "**/*.md"),
    (Path("/usr/share/doc"), "**/README*"),
    (Path("/usr/share/perl"), "**/*.pod"),
)

RECALL_SHARE = 0.2
SHORT, LONG = (512, 8), (2048, 2)
"""Sequence length and batch: most of the time short, the last part long."""
LONG_FROM, DECAY_FROM, WARM_UP_STEPS, FLOOR = 0.72, 0.35, 40, 0.02
"""The schedule, in shares of the time given."""
MATRIX_RATE, VECTOR_RATE = 0.02, 3e-3

WORDS = (  # names in exercises are two of these
    "alpha beta gamma delta width height depth port host limit cache batch token layer head value query score bit "
    "group scale zero page block chunk window rank seed step rate size count index offset level mode state phase "
    "point line angle radius mass speed time date year month price cost tax total share name code path root leaf node "
    "edge graph tree list table row column cell key lock door room floor wall roof stone river lake hill star moon "
    "sun cloud rain snow wind fire ice sand salt iron gold lead zinc"
)

log = logging.getLogger("train")


def main() -> None:
    """Collect, tokenize, train, save."""
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    documents = collect()[: options.documents]
    log.info("%d documents, %.1f million characters", len(documents), sum(map(len, documents)) / 1e6)
    tokenizer = train_tokenizer(documents)
    data = Data(tokenizer, encode(tokenizer, documents), encode(tokenizer, builtin_texts(held_out=True)))
    log.info("%.2f million tokens", len(data.tokens) / 1e6)
    model = build()
    if not options.float32:
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    train(model, data, options.minutes * 60)
    save(model, tokenizer, options.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the built-in model anew.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--minutes", type=float, default=92.0, help="of training proper")
    parser.add_argument("--float32", action="store_true", help="faster on a CPU without bfloat16 instructions")
    parser.add_argument("--documents", type=int, help="at most so many, for a quick trial")
    return parser.parse_args()


# Text


def collect() -> list[str]:
    """Every training document on this machine, in a fixed random order."""
    documents = [*reference_topics(held_out=False), *library(), *packages(), *prose()]
    random.Random(0).shuffle(documents)
    return documents


def library() -> Iterator[str]:
    """The standard library without the held-out modules, and with a third of its tests."""
    for path in sorted(LIBRARY.rglob("*.py")):
        place = path.relative_to(LIBRARY)
        top = place.parts[0].removesuffix(".py")
        bulky = top in ("test", "lib2to3") and zlib.crc32(str(place).encode()) % 3
        if top in HELD_OUT_MODULES or bulky or {"site-packages", "pydoc_data", "idle_test"} & set(place.parts):
            continue
        yield from readable(path, at_least=400)


def packages() -> Iterator[str]:
    """A share of the sources of some installed packages."""
    for package, share in SHARES.items():
        for path in sorted((PACKAGES / package).rglob("*.py")):
            if zlib.crc32(path.name.encode()) % share == 0:
                yield from (text for text in readable(path, at_least=1000) if len(text) < 200_000)


def prose() -> Iterator[str]:
    """Package descriptions and the system's documentation."""
    for folder, pattern in PROSE:
        for path in sorted(folder.glob(pattern)):
            yield from (text[:60_000] for text in readable(path, at_least=1500))


def readable(path: Path, at_least: int) -> list[str]:
    """The file's text; nothing if it is short or no text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    return [text] if len(text) >= at_least else []


# Tokens


def train_tokenizer(documents: Sequence[str]) -> Tokenizer:
    """Byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = random.Random(1).sample(documents, min(900, len(documents)))
    tokenizer.train_from_iterator(sample, trainer=trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> np.ndarray:
    """All documents as one array of uint16 ids, each between BOS and EOS."""
    encoded = (tokenizer.encode_batch(documents[i : i + 64]) for i in range(0, len(documents), 64))
    return np.concatenate([np.array([BOS, *one.ids, EOS], np.uint16) for batch in encoded for one in batch])


@dataclass
class Data:
    """Tokens to train on and to watch, and the batches made of them."""

    tokenizer: Tokenizer
    tokens: np.ndarray
    held_out: np.ndarray
    chance: random.Random = field(default_factory=lambda: random.Random(0))

    def batch(self, length: int, rows: int) -> torch.Tensor:
        """Ids `[rows, length]`: stretches of text, and recall exercises among them."""
        return torch.tensor([self._row(length) for _ in range(rows)])

    def exercise(self, length: int) -> list[int]:
        """Assignments with filler around them, then checks of the same values."""
        pairs = self._pairs(self.chance.randint(2, 6 if length < 1000 else 14))
        room = max(length - 30 * len(pairs), 1)
        cuts = sorted(self.chance.randint(0, room) for _ in pairs)
        ids = [BOS]
        for (name, value), cut, last in zip(pairs, cuts, [0, *cuts], strict=False):
            ids += self._text((cut - last) // 2) + self._ids(f"\n{name} = {value}\n")
        checks = 12 * len(pairs) + self.chance.randint(0, length // 4)
        ids += self._text(length - len(ids) - checks)
        while len(ids) < length:
            name, value = self.chance.choice(pairs)
            ids += self._ids(f"\nassert {name} == {value}\n")
        return ids[:length]

    def _row(self, length: int) -> list[int]:
        return self.exercise(length) if self.chance.random() < RECALL_SHARE else self._text(length)

    def _pairs(self, count: int) -> list[tuple[str, str]]:
        words = WORDS.split()
        names: dict[str, None] = {}
        while len(names) < count:
            names[f"{self.chance.choice(words)}_{self.chance.choice(words)}"] = None
        return [(name, f"{self.chance.randrange(10_000):04d}") for name in names]

    def _text(self, length: int) -> list[int]:
        start = self.chance.randrange(len(self.tokens) - max(length, 0))
        ids: list[int] = self.tokens[start : start + max(length, 0)].tolist()
        return ids

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids


# Training


def build() -> LlamaForCausalLM:
    """The untrained model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            intermediate_size=704,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )


def optimizers(model: LlamaForCausalLM) -> list[Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest."""
    matrices = {id(weight): weight for weight in model.model.layers.parameters() if weight.ndim == 2}
    rest = [weight for weight in model.parameters() if id(weight) not in matrices]
    return [
        torch.optim.Muon(list(matrices.values()), lr=MATRIX_RATE, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=VECTOR_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, spent: float) -> float:
    """Factor of the learning rates: warm up, stay, fall linearly. `spent` is the share of the time that is over."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    return warm_up * (1.0 if spent < DECAY_FROM else max(FLOOR, 1 - (spent - DECAY_FROM) / (1 - DECAY_FROM)))


def train(model: LlamaForCausalLM, data: Data, seconds: float) -> None:
    """Train for so many seconds; says every 20 steps and at each tenth how it goes."""
    chosen = optimizers(model)
    initial = [optimizer.param_groups[0]["lr"] for optimizer in chosen]
    start, step, reported = time.monotonic(), 0, 0.0
    while (spent := (time.monotonic() - start) / seconds) < 1:
        for optimizer, base in zip(chosen, initial, strict=True):
            optimizer.param_groups[0]["lr"] = base * rate(step, spent)
        loss = update(model, chosen, data.batch(*(SHORT if spent < LONG_FROM else LONG)))
        if step % 20 == 0:
            log.info("step %d, %.0f %% of the time, loss %.3f", step, 100 * spent, loss)
        if spent >= reported:
            log.info("held-out loss %.3f, recalled %d of %d", held_out_loss(model, data), *recalled(model, data))
            reported += 0.1
        step += 1
    log.info("finished after %d steps: held-out loss %.3f", step, held_out_loss(model, data))


def update(model: LlamaForCausalLM, chosen: Sequence[Optimizer], ids: torch.Tensor) -> float:
    """One step; returns the loss."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in chosen:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, data: Data, stretches: int = 8, length: int = 1024) -> float:
    """Mean next-token loss on stretches spread evenly over the held-out text."""
    losses = []
    for start in range(0, stretches * (len(data.held_out) // stretches), len(data.held_out) // stretches):
        ids = torch.tensor(data.held_out[start : start + length].astype(np.int64))[None]
        losses.append(float(model(input_ids=ids, labels=ids).loss))
    return sum(losses) / len(losses)


@torch.no_grad()
def recalled(model: LlamaForCausalLM, data: Data, exercises: int = 12, length: int = 768) -> tuple[int, int]:
    """Count values in the later part of some exercises that are right in every digit, and all asked for."""
    equals, right, total = data.tokenizer.token_to_id("Ġ=="), 0, 0
    watched = Data(data.tokenizer, data.tokens, data.held_out, random.Random(123))
    for _ in range(exercises):
        ids = watched.exercise(length)
        guesses = model(input_ids=torch.tensor([ids])).logits.argmax(-1)[0].tolist()
        checks = [i for i in range(length // 2, length - 5) if ids[i] == equals]
        right += sum(guesses[i : i + 5] == ids[i + 1 : i + 6] for i in checks)
        total += len(checks)
    return right, total


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model in bfloat16, and its tokenizer."""
    model.to(torch.bfloat16).save_pretrained(folder)
    names = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **names).save_pretrained(folder)
    log.info("written to %s", folder)


if __name__ == "__main__":
    main()
