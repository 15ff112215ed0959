import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmix_cli.cache.subject import UNQUANTIZED
from kvmix_cli.errors import EvaluationError
from kvmix_cli.evaluation.gates import parse_gate
from kvmix_cli.evaluation.results import Estimate, Row

METRICS = ["perplexity", "loss_increase", "recall", "compression"]
RELATIVE = ["perplexity", "recall", "compression"]


def gate(expression):
    return parse_gate(expression, METRICS, RELATIVE)


def row(name, error=None, **metrics):
    estimates = {metric: Estimate.exact(value) for metric, value in metrics.items()}
    return Row("task", name, 2.0, 3.0, metrics=estimates, error=error)


@pytest.mark.parametrize(
    ("expression", "unquantized", "passes", "fails"),
    [
        ("perplexity>+1%", 10.0, 10.1, 10.11),
        ("perplexity>=+1%", 10.0, 10.09, 10.1),
        ("perplexity>+0.05", 10.0, 10.05, 10.06),
        ("perplexity>12", 10.0, 12.0, 12.1),
        ("recall<0.8", 0.9, 0.8, 0.79),
        ("recall<=.8", 0.9, 0.81, 0.8),
        ("recall<-0.1", 0.9, 0.81, 0.79),
        ("recall<-10%", 0.9, 0.82, 0.8),
        ("compression<4", 1.0, 4.0, 3.9),
        (" Perplexity  >  +1.5e1 % ", 10.0, 11.4, 11.6),
    ],
)
def test_a_gate_states_what_fails(expression, unquantized, passes, fails):
    parsed = gate(expression)
    reference = row(UNQUANTIZED, **{parsed.metric: unquantized})
    assert parsed.check([row("plan", **{parsed.metric: passes})], reference).passed
    verdict = parsed.check([row("good", **{parsed.metric: passes}), row("bad", **{parsed.metric: fails})], reference)
    assert not verdict.passed
    assert verdict.expression == expression.strip()
    assert len(verdict.failures) == 1
    assert verdict.failures[0].startswith("bad: ")


@pytest.mark.parametrize(
    "expression",
    [
        *("", "perplexity", "perplexity>", ">1", "perplexity=1", "perplexity>1%x", "perplexity>nan", "perplexity>inf"),
        *("perplexity>+-1", "perplexity<>1", "1>perplexity", "perplexity>1>2", "perplexity>1e999", "perplexity > 1 2"),
    ],
)
def test_what_is_no_gate_is_an_error_that_shows_one(expression):
    with pytest.raises(EvaluationError, match=r"is not a gate: .*perplexity>"):
        gate(expression)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("ppl>1", r"no metric 'ppl'.*perplexity, loss_increase, recall, compression"),
        ("perplexty>1", r"did you mean 'perplexity'\?"),
        ("perplexity>1%", r"needs a sign, as in perplexity>\+1%"),
        ("loss_increase>+1", "no unquantized value"),
    ],
)
def test_a_gate_that_makes_no_sense_says_why(expression, said):
    with pytest.raises(EvaluationError, match=said):
        gate(expression)


def test_what_was_not_measured_has_not_passed():
    reference, broken = row(UNQUANTIZED, perplexity=10.0), row("broken", error="no memory")
    assert not gate("perplexity>12").check([broken], reference).passed
    unmeasured = row(UNQUANTIZED, error="no memory")
    assert not gate("perplexity>+1%").check([row("plan", perplexity=1.0)], unmeasured).passed
    assert gate("perplexity>12").check([row("plan", perplexity=1.0)], unmeasured).passed


positive = st.floats(0.001, 1000)


@given(value=positive, unquantized=positive, number=st.integers(0, 500), percent=st.booleans(), plus=st.booleans())
def test_relative_gates_agree_with_arithmetic(value, unquantized, number, percent, plus):
    change = (1 if plus else -1) * number * (unquantized / 100 if percent else 1)
    limit = unquantized + change
    if math.isclose(value, limit, rel_tol=1e-9):
        return
    text = f"perplexity>{'+' if plus else '-'}{number}{'%' if percent else ''}"
    verdict = gate(text).check([row("plan", perplexity=value)], row(UNQUANTIZED, perplexity=unquantized))
    assert verdict.passed == (value < limit)


@given(value=positive, worse=positive, limit=st.decimals(0, 100, places=3), reference=positive)
def test_a_worse_value_never_passes_where_a_better_one_fails(value, worse, limit, reference):
    better, worse = sorted((value, worse))
    check = gate(f"perplexity>+{limit}%").check
    unquantized = row(UNQUANTIZED, perplexity=reference)
    if check([row("worse", perplexity=worse)], unquantized).passed:
        assert check([row("better", perplexity=better)], unquantized).passed


@pytest.mark.slow
@given(st.text(max_size=30))
def test_any_text_is_a_gate_or_an_evaluation_error(text):
    try:
        parsed = gate(text)
    except EvaluationError as error:
        assert "\n" not in str(error).replace(text, "")
    else:
        assert math.isfinite(parsed.number)
