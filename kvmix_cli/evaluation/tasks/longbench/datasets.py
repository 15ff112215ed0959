"""The 21 data sets with their prompts, ends and metrics, after LongBench's own `pred.py` and `eval.py`. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ....errors import EvaluationError, did_you_mean


@dataclass(frozen=True)
class LongBenchDataset:
    """One data set.

    Attributes:
        metric: name of a function of lm-eval's LongBench metrics.
        max_new_tokens: most tokens of an answer.
        extended: LongBench-E has it too.
        chat: a chat model gets the prompt in its chat template.
        first_line: only the first line of an answer is scored.
        stop_at_newline: an answer also ends at a newline.
        answer: a pattern that the metric needs to find in each reference answer.
    """

    name: str
    metric: str
    max_new_tokens: int
    extended: bool = False
    chat: bool = True
    first_line: bool = False
    stop_at_newline: bool = False
    answer: str = ""

    @property
    def key(self) -> str:
        """Return the name as part of a metric's name."""
        return self.name.replace("-", "_")


_QA, _QA_ZH = "qa_f1_score", "qa_f1_zh_score"
_ROUGE, _ROUGE_ZH = "rouge_score", "rouge_zh_score"
_CLASS, _CODE = "classification_score", "code_sim_score"

_ALL = (
    LongBenchDataset("narrativeqa", _QA, 128),
    LongBenchDataset("qasper", _QA, 128, extended=True),
    LongBenchDataset("multifieldqa_en", _QA, 64, extended=True),
    LongBenchDataset("multifieldqa_zh", _QA_ZH, 64),
    LongBenchDataset("hotpotqa", _QA, 32, extended=True),
    LongBenchDataset("2wikimqa", _QA, 32, extended=True),
    LongBenchDataset("musique", _QA, 32),
    LongBenchDataset("dureader", _ROUGE_ZH, 128),
    LongBenchDataset("gov_report", _ROUGE, 512, extended=True),
    LongBenchDataset("qmsum", _ROUGE, 512),
    LongBenchDataset("multi_news", _ROUGE, 512, extended=True),
    LongBenchDataset("vcsum", _ROUGE_ZH, 512),
    LongBenchDataset("trec", _CLASS, 64, extended=True, chat=False, first_line=True),
    LongBenchDataset("triviaqa", _QA, 32, extended=True, chat=False, first_line=True),
    LongBenchDataset("samsum", _ROUGE, 128, extended=True, chat=False, first_line=True, stop_at_newline=True),
    LongBenchDataset("lsht", _CLASS, 64, chat=False, first_line=True),
    LongBenchDataset("passage_count", "count_score", 32, extended=True),
    LongBenchDataset("passage_retrieval_en", "retrieval_score", 32, extended=True, answer=r"Paragraph \d+"),
    LongBenchDataset("passage_retrieval_zh", "retrieval_zh_score", 32, answer=r"段落\d+"),
    LongBenchDataset("lcc", _CODE, 64, extended=True, chat=False),
    LongBenchDataset("repobench-p", _CODE, 64, extended=True, chat=False),
)

DATASETS = {dataset.name: dataset for dataset in _ALL}
"""LongBench, in its own order."""
DATASETS_E = {dataset.name: dataset for dataset in _ALL if dataset.extended}
"""LongBench-E, with comparable amounts of data in each bin of lengths."""

KVMIX8, LONGCTX = "kvmix8", "longctx"
SUBSETS = {
    KVMIX8: (
        "triviaqa",
        "qasper",
        "multifieldqa_en",
        "qmsum",
        "2wikimqa",
        "repobench-p",
        "trec",
        "passage_retrieval_en",
    ),
    LONGCTX: (
        "narrativeqa",
        "qasper",
        "multifieldqa_en",
        "hotpotqa",
        "2wikimqa",
        "musique",
        "gov_report",
        "qmsum",
        "multi_news",
        "trec",
        "triviaqa",
        "samsum",
        "passage_count",
        "passage_retrieval_en",
        "lcc",
        "repobench-p",
    ),
}
"""Data sets under one name. `kvmix8` is the set over which the KVmix paper (arXiv 2506.08018) averages, `longctx` that
of longctx_bench (Yuan et al. 2024, arXiv 2407.01527): all that are in English."""

MEMBERS: Mapping[str, tuple[str, ...]] = {**{name: (name,) for name in DATASETS}, **SUBSETS}
"""Names that `longbench:` takes, and the data sets that each stands for."""
MEMBERS_E: Mapping[str, tuple[str, ...]] = {name: (name,) for name in DATASETS_E}
"""Names that `longbench-e:` takes."""

BINS = {"0_4k": range(4000), "4_8k": range(4000, 8000), "8k": range(8000, 2**63)}
"""LongBench-E's bins of lengths, in words (characters in Chinese)."""


def select(members: Sequence[str], known: Mapping[str, tuple[str, ...]], family: str) -> tuple[LongBenchDataset, ...]:
    """Return the data sets that some members stand for, each once; all of them if there are no members.

    Raises:
        EvaluationError: if a member is unknown.
    """
    for member in members:
        if member not in known:
            raise EvaluationError(
                f"{family} has no data set '{member}'{did_you_mean(member, known)}; it has {', '.join(known)}"
            )
    names = [name for member in members or known for name in known[member]]
    return tuple(DATASETS[name] for name in dict.fromkeys(names))
