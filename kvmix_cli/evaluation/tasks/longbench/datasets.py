"""The 21 data sets: how each is asked, stopped and scored, after LongBench's own `pred.py` and `eval.py`. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ....errors import EvaluationError, did_you_mean


@dataclass(frozen=True)
class Dataset:
    """One data set.

    Attributes:
        metric: a function of lm-eval's LongBench metrics.
        max_new_tokens: the most tokens of an answer.
        extended: whether LongBench-E has it too.
        chat: whether a chat model is asked in its chat template.
        first_line: whether only the first line of an answer is scored.
        stop_at_newline: whether an answer also ends at a newline.
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
        """The name as part of a metric's name."""
        return self.name.replace("-", "_")


_QA, _QA_ZH = "qa_f1_score", "qa_f1_zh_score"
_ROUGE, _ROUGE_ZH = "rouge_score", "rouge_zh_score"
_CLASS, _CODE = "classification_score", "code_sim_score"

_ALL = (
    Dataset("narrativeqa", _QA, 128),
    Dataset("qasper", _QA, 128, extended=True),
    Dataset("multifieldqa_en", _QA, 64, extended=True),
    Dataset("multifieldqa_zh", _QA_ZH, 64),
    Dataset("hotpotqa", _QA, 32, extended=True),
    Dataset("2wikimqa", _QA, 32, extended=True),
    Dataset("musique", _QA, 32),
    Dataset("dureader", _ROUGE_ZH, 128),
    Dataset("gov_report", _ROUGE, 512, extended=True),
    Dataset("qmsum", _ROUGE, 512),
    Dataset("multi_news", _ROUGE, 512, extended=True),
    Dataset("vcsum", _ROUGE_ZH, 512),
    Dataset("trec", _CLASS, 64, extended=True, chat=False, first_line=True),
    Dataset("triviaqa", _QA, 32, extended=True, chat=False, first_line=True),
    Dataset("samsum", _ROUGE, 128, extended=True, chat=False, first_line=True, stop_at_newline=True),
    Dataset("lsht", _CLASS, 64, chat=False, first_line=True),
    Dataset("passage_count", "count_score", 32, extended=True),
    Dataset("passage_retrieval_en", "retrieval_score", 32, extended=True, answer=r"Paragraph \d+"),
    Dataset("passage_retrieval_zh", "retrieval_zh_score", 32, answer=r"段落\d+"),
    Dataset("lcc", _CODE, 64, extended=True, chat=False),
    Dataset("repobench-p", _CODE, 64, extended=True, chat=False),
)

DATASETS = {dataset.name: dataset for dataset in _ALL}
"""LongBench, in its own order."""
DATASETS_E = {dataset.name: dataset for dataset in _ALL if dataset.extended}
"""LongBench-E, with comparable amounts of data in each bin of lengths."""

KVMIX8 = "kvmix8"
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
}
"""Data sets under one name. `kvmix8` are those over which the KVmix paper (arXiv 2506.08018) averages."""

MEMBERS: Mapping[str, tuple[str, ...]] = {**{name: (name,) for name in DATASETS}, **SUBSETS}
"""What `longbench:` takes, and the data sets it stands for."""
MEMBERS_E: Mapping[str, tuple[str, ...]] = {name: (name,) for name in DATASETS_E}
"""What `longbench-e:` takes."""

BINS = {"0_4k": range(4000), "4_8k": range(4000, 8000), "8k": range(8000, 2**63)}
"""LongBench-E's bins of lengths, in words (characters in Chinese)."""


def select(members: Sequence[str], known: Mapping[str, tuple[str, ...]], family: str) -> tuple[Dataset, ...]:
    """The data sets that some members stand for, each once; all of them if there are no members.

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
