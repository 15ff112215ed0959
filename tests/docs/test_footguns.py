"""What docs/footguns.md says goes wrong still does, on less text; and what it says holds, holds."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest
from commandline import kvmix
from others import need_quanto

SCRIPT = Path(__file__).parents[2] / "examples" / "footguns.py"


@pytest.fixture(scope="module")
def footguns():
    """The script, on shorter texts than those of the page."""
    spec = importlib.util.spec_from_file_location("footguns", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.Settings = partial(module.Settings, length=640)
    module.documents = partial(module.documents, length=512)
    module.requantized = partial(module.requantized, new=768)
    return module


@pytest.mark.slow
def test_one_pass_sees_nothing_of_a_cache_that_reading_back_shows_to_be_ruined(footguns):
    (_, *full), (_, *two), (_, *one) = footguns.one_pass(1).rows
    assert full[0] == two[0] == one[0], "to the last digit, even at 1 bit"
    assert one[-1] > 10 * full[-1]
    assert full[-1] < two[-1] < one[-1]
    assert full[1] == pytest.approx(one[1]), "one large step is one pass again"
    assert one[1] < one[2] < one[3], "the smaller the steps, the more is read back"


@pytest.mark.slow
def test_the_first_token_never_depends_on_the_cache_and_the_second_does(footguns):
    assert footguns.first_token(2).rows == [["first", 2, 2], ["second", 2, 0]]


@pytest.mark.slow
def test_a_short_text_is_not_quantized_at_all(footguns):
    short, *others = footguns.windows(1).rows
    assert short[1] == 0
    assert short[2].value == pytest.approx(0, abs=0.01)  # in %; rounding, where attention is not the native one
    assert all(share > 40 and increase.value > 100 for _, share, increase in others)


@pytest.mark.slow
def test_that_is_said_aloud(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--length", 160, "--prefix", 100, "--uniform", 1, "--limit", 1)
    result = kvmix("eval", "--model", "builtin:tiny", "--device", "cpu", *options)
    assert "NOTHING QUANTIZED WAS READ" in result.stderr


@pytest.mark.slow
def test_small_groups_are_bits_too_and_wider_codes_spend_them_better(footguns):
    full, large, medium, small, wider = footguns.unequal_bytes(1).rows
    assert [row[1] for row in (large, medium, small, wider)] == [2, 2, 2, 3]
    assert [row[2] for row in (large, medium, small, wider)] == [2.5, 3, 4, 3.5]
    assert small[3].value < large[3].value, "at equal nominal bits small groups look better"
    assert wider[3].value < small[3].value, "but fewer stored bits are better spent on width"
    lost = (full[4] - large[4]) / full[4]
    assert lost > 2 * large[3].value / 100, "recall loses more than perplexity shows"


@pytest.mark.slow
def test_differences_on_the_same_samples_are_far_better_known_than_the_numbers_themselves(footguns):
    for _, full, _, difference in footguns.pairing(2).rows[:1]:
        assert difference.high - difference.low < (full.high - full.low) / 4


@pytest.mark.slow
def test_counting_the_prompt_makes_any_speed(footguns):
    everything, _, decoding = (speed for _, speed in footguns.tokens_per_second().rows)
    assert everything > 3 * decoding


@pytest.mark.slow
def test_padding_changes_a_quantized_cache_and_no_other(footguns):
    sixteen, _, two = footguns.left_padding(1).rows
    assert sixteen[1] == pytest.approx(0, abs=1e-5)
    assert sixteen[2] == pytest.approx(0, abs=1e-5)
    assert two[2] > two[1] / 10 > 1e-4


@pytest.mark.slow
def test_quantizing_again_what_was_quantized_adds_up_in_one_backend_alone(footguns):
    need_quanto()
    pytest.importorskip("hqq")
    growth = {(cache, bits): times for cache, bits, _, _, times in footguns.requantizing().rows}
    assert all(times == pytest.approx(1, abs=0.01) for (cache, _), times in growth.items() if cache != "HQQ, axis 0")
    assert all(times > 3 for (cache, _), times in growth.items() if cache == "HQQ, axis 0")
    assert len(growth) == 6


@pytest.mark.slow
def test_the_script_prints_the_tables_that_are_asked_for(footguns, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["footguns.py", "first_token", "--limit", "1"])
    footguns.main()
    assert capsys.readouterr().out.startswith("first_token: Logits")
    monkeypatch.setattr(sys, "argv", ["footguns.py", "first_tokn"])
    with pytest.raises(SystemExit):
        footguns.main()
    assert "no first_tokn; there are one_pass," in capsys.readouterr().err
