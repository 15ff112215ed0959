import sys

import pytest

from kvmix_cli.errors import EvaluationError
from kvmix_cli.evaluation.tasks.longbench import lm_eval_parts
from kvmix_cli.evaluation.tasks.longbench.datasets import DATASETS
from kvmix_cli.evaluation.tasks.longbench.lm_eval_parts import score

CLASSES = ["Reason", "Manner of an action", "Action", "Number"]

BY_HAND = [
    # "cat sat on mat" against "cat on mat": 3 of 4 words right, 3 of 3 found, F1 = 2 * 3/4 * 1 / (3/4 + 1)
    ("qasper", "The cat sat on a mat.", ["a cat, on the MAT"], 600 / 7),
    ("narrativeqa", "Paris", ["London", "Paris"], 100),
    ("hotpotqa", "", ["London"], 0),
    # three words, one of them right: precision 1/3, recall 1
    ("multifieldqa_zh", "我爱北京", ["北京。"], 50),
    # longest common subsequence "the cat" of 3 words each
    ("gov_report", "the cat sat", ["the cat ran"], 200 / 3),
    # sentences are joined word by word: 3 of 6 words of the reference, 3 of 4 said
    ("qmsum", "one two three nine", ["one two three four five six"], 60),
    ("multi_news", "", ["anything"], 0),
    # 我 爱 of three words each
    ("dureader", "我爱北京", ["我爱上海"], 200 / 3),
    ("vcsum", "北京", ["上海"], 0),
    ("trec", "Reason", ["Reason"], 100),
    # two classes are named, one is right
    ("trec", "Reason or Number", ["Reason"], 50),
    # letters matter: "Action" is no part of "Manner of an action", so it stays and halves the score
    ("trec", "Manner of an action, Action", ["Manner of an action"], 50),
    ("trec", "none of them", ["Reason"], 0),
    ("lsht", "Number", ["Reason"], 0),
    # of the numbers 2 and 7 one is the paragraph's
    ("passage_retrieval_en", "Paragraph 2 or 7", ["Paragraph 2"], 50),
    ("passage_retrieval_en", "I cannot tell", ["Paragraph 2"], 0),
    ("passage_retrieval_zh", "段落12", ["段落12"], 100),
    # "12" is not "2"
    ("passage_retrieval_zh", "段落12", ["段落2"], 0),
    ("passage_count", "3, 3 or 5", ["3"], 200 / 3),
    ("passage_count", "three", ["3"], 0),
    # 3 of 4 letters match on each side: 2 * 3 / 8
    ("lcc", "abcd", ["abxd"], 75),
    # blank lines, remarks and fences are passed over
    ("repobench-p", "\n  \n# a remark\n```\nabcd\nwhatever", ["abcd"], 100),
    ("lcc", "// only a remark", ["abcd"], 0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prediction", "answers", "wanted"), BY_HAND)
def test_every_metric_gives_what_was_computed_by_hand(name, prediction, answers, wanted):
    assert score(DATASETS[name], prediction, answers, CLASSES) == pytest.approx(wanted, abs=1e-5)


def test_every_metric_is_among_those_computed_by_hand():
    tried = {DATASETS[name].metric for name, *_ in BY_HAND}
    assert tried == {dataset.metric for dataset in DATASETS.values()}
    assert len(tried) == 9


@pytest.mark.parametrize("name", ["trec", "triviaqa", "samsum", "lsht"])
def test_only_the_first_line_counts_in_few_shot_data_sets(name):
    assert score(DATASETS[name], "\n\nReason\nNumber Manner", ["Reason"], CLASSES) == pytest.approx(100)


@pytest.mark.parametrize("name", ["qasper", "gov_report", "passage_count"])
def test_all_lines_count_elsewhere(name):
    assert 0 < score(DATASETS[name], "7\n8", ["8"]) < 100


def test_a_part_of_the_right_class_does_not_count_as_another_class():
    classes = ["animal", "animal organ"]
    assert score(DATASETS["trec"], "animal organ", ["animal organ"], classes) == 100


def test_the_best_reference_answer_counts():
    answers = ["nothing of it", "the cat ran", "the cat sat"]
    assert score(DATASETS["samsum"], "the cat sat", answers) == pytest.approx(100)


@pytest.mark.slow
def test_long_sentences_are_scored_however_deep_the_stack():
    said = " ".join(["shared", *(f"a{number}" for number in range(700))])
    wanted = " ".join(["shared", *(f"b{number}" for number in range(700))])
    limit = sys.getrecursionlimit()
    assert score(DATASETS["gov_report"], said, [wanted]) == pytest.approx(100 / 701, abs=1e-5)
    assert sys.getrecursionlimit() == limit


@pytest.fixture
def fresh():
    """lm-eval is looked for again, now and afterwards."""
    caches = (lm_eval_parts._metrics, lm_eval_parts.prompt_text)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("package", ["jieba", "rouge", "fuzzywuzzy"])
def test_a_missing_package_is_named_with_the_extra_to_install(package, monkeypatch, fresh):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EvaluationError, match=rf"{package}.*pip install 'kvmix\[eval\]'"):
        lm_eval_parts.metric("qa_f1_score")


def test_without_lm_eval_the_extra_to_install_is_named(monkeypatch, fresh):
    monkeypatch.setattr(lm_eval_parts.importlib.util, "find_spec", lambda name: None)
    for ask in (lambda: lm_eval_parts.metric("qa_f1_score"), lambda: lm_eval_parts.prompt_text("qasper")):
        with pytest.raises(EvaluationError, match=r"lm-eval is not installed; .*pip install 'kvmix\[eval\]'"):
            ask()


@pytest.mark.parametrize("text", ["task: x", "- a\n- b", "doc_to_text: [1]", "a: [", ""])
def test_a_prompt_file_of_another_shape_is_an_error_that_names_the_version(text, monkeypatch, tmp_path, fresh):
    (tmp_path / "qasper.yaml").write_text(text)
    monkeypatch.setattr(lm_eval_parts, "_folder", lambda: tmp_path)
    with pytest.raises(EvaluationError, match=r"lm-eval 0\.[\d.]+ has no prompt in .*qasper\.yaml"):
        lm_eval_parts.prompt_text("qasper")
    with pytest.raises(EvaluationError, match=r"has no metrics in .*metrics\.py"):
        lm_eval_parts.metric("qa_f1_score")


def test_a_metric_of_another_name_is_an_error_that_names_the_version():
    with pytest.raises(EvaluationError, match=r"lm-eval 0\.[\d.]+ has no metric bleu"):
        lm_eval_parts.metric("bleu")
