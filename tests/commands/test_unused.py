"""Options that change nothing say so, and those that contradict what is named as well are refused."""

import pytest
from evaluating import tiny
from made_up import falling

from kvmix_cli.allocation import Budget, allocate
from kvmix_cli.errors import BudgetError
from kvmix_cli.evaluation import get_task
from kvmix_cli.evaluation.base import Settings

RANK = ("allocate", "--avg-bits", "2.3", "--method", "rank")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ((*RANK, "--resume"), "--resume is for --method search"),
        ((*RANK, "--trials", "40"), "--trials is for --method search"),  # its default, yet it was asked for
        ((*RANK, "--calibration", "notes.txt"), "--calibration is for --method search"),
        ((*RANK, "--device", "cpu"), "--device is for --method search"),
        ((*RANK, "--seed", "1"), "--seed is for what is drawn at random"),
        ((*RANK, "--exact", "2"), "--exact is for --method transform"),
        ((*RANK, "--out", "a.yaml", "--name", "b"), "--name is for a plan without --out"),
        (("list", "presets", "--model", "a/b"), "--model is for plans"),
        (("inspect", "profiles/org--model/profile.yaml", "--batch", "2"), "--batch is for one plan"),
    ],
)
@pytest.mark.usefixtures("profiled")
def test_an_option_without_effect_says_so(kvmix, command, option):
    ran = kvmix(*command)
    assert ran.code == 0, ran.err
    assert [option in line for line in ran.err.splitlines() if "changes nothing here" in line] == [True]


@pytest.mark.usefixtures("profiled")
def test_options_that_count_say_nothing(kvmix):
    assert "changes nothing" not in kvmix(*RANK, "--k-bits", "2,3", "--group-size", "32", "--name", "x").err
    assert "--seed" not in kvmix("allocate", "--avg-bits", "2.3", "--method", "random", "--seed", "1").err


@pytest.mark.usefixtures("loaded_once")
def test_run_says_what_greedy_decoding_has_no_use_for(kvmix):
    prompt = ("run", "--model", "builtin:tiny", "--baseline", "--prompt", "def f(", "--max-new-tokens", "1")
    ran = kvmix(*prompt, "--seed", "0", "--top-p", "0.5", "--plan", "0-7:k2v2")
    assert [line.split()[1] for line in ran.err.splitlines() if "changes nothing here" in line] == [
        "--top-p",
        "--seed",
        "--plan",
    ]
    assert "changes nothing" not in kvmix(*prompt, "--seed", "0", "--temperature", "0.1").err


@pytest.mark.parametrize(
    ("tasks", "options", "unread"),
    [
        ("recall", ("--prefix", "64"), {"--prefix"}),
        ("recall,passkey", ("--contexts", "300", "--length", "300"), {"--length"}),
        ("memory", ("--step", "2", "--text", "builtin"), {"--step"}),
        ("memory,perplexity", ("--step", "2", "--prefix", "64"), set()),
    ],
)
def test_eval_says_what_its_tasks_have_no_use_for(kvmix, tasks, options, unread):
    ran = kvmix("eval", "--model", "no/such/model", "--uniform", "2", "--task", tasks, *options)
    assert ran.code == 1
    assert {line.split()[1] for line in ran.err.splitlines() if "changes nothing here" in line} == unread


class Spy:
    """Settings that remember which of them were read."""

    def __init__(self, settings):
        self._settings, self.read = settings, set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self._settings, name)


@pytest.mark.parametrize("name", ["recall", "passkey", "kv_retrieval", "multi_hop", "memory", "throughput"])
def test_tasks_name_the_settings_that_they_do_not_read(name):
    task, settings = get_task(name), Spy(Settings(length=400, limit=1))
    samples = task.samples(tiny(), settings)
    task.describe(samples, Settings(length=400, limit=1))
    assert not settings.read & {*task.unread}
    assert "prefix" in task.unread and "length" not in task.unread


@pytest.mark.usefixtures("profiled")
def test_a_profile_of_another_model_than_the_one_named_is_refused(kvmix):
    file = "profiles/org--model/profile.yaml"
    ran = kvmix(*RANK, "--profile", file, "--model", "org/other")
    assert ran.code == 1
    assert f"{file} is of org/model, not of org/other" in ran.error
    assert kvmix(*RANK, "--profile", file, "--model", "org/model").code == 0


def test_transform_codes_are_decided_by_no_other_score(coded_profile):
    with pytest.raises(BudgetError, match="by score fisher-metric, not by 'grad-norm': leave out --score"):
        allocate(coded_profile, Budget(avg_bits=2.3), method="transform", score="grad-norm", basis=object())


@pytest.fixture
def coded_profile():
    """A profile: what it holds is not read, since its score is refused before."""
    return falling(2)
