"""Windows: how many tokens of the tail stay, and how many whole pages go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import patient, windows

from kvmix_cli.errors import KvmixError
from kvmix_cli.plan import CacheSettings
from kvmix_cli.plan.windows import NoWindow, Recent, Rpc, parse_window


@patient
@given(windows, st.integers(0, 10_000), st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 16).map(lambda n: 16 * n))
def test_whole_pages_go_and_the_window_stays(window, tail, bits, page):
    due = window.due(tail, bits, page)
    assert due % page == 0
    assert 0 <= due <= tail
    assert due == 0 or tail - due >= window.keep(tail, bits)
    assert due + page > tail - window.keep(tail, bits)


def test_rpc_is_a_share_of_the_current_tail_and_so_collapses():
    """The paper's own example: a prompt of 4096 tokens (reference: its released code, ratio 0.2, groups of 32)."""
    tail, seen = 4096, []
    while due := Rpc().due(tail, 4, 32):
        tail -= due
        seen.append(tail)
    assert seen == [832, 192, 64, 32]


def test_rpc_keeps_more_at_more_bits():
    assert [Rpc().keep(1000, bits) for bits in (1, 2, 3, 4, 8)] == [100, 100, 200, 200, 200]
    assert [Rpc(ratio={2: 0.5}).keep(1000, bits) for bits in (2, 4)] == [500, 200]


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ("recent:7", Recent(tokens=7)),
        ("recent", Recent(tokens=128)),
        ("recent:0", Recent(tokens=0)),
        ("rpc", Rpc()),
        ("none", NoWindow()),
    ],
)
def test_windows_on_the_command_line(text, window):
    assert parse_window(text) == window
    assert parse_window(window.short) == window


@pytest.mark.parametrize("text", ["", "recent:-1", "recent:x", "rpc:2", "all", "recent:1:2"])
def test_unknown_windows(text):
    with pytest.raises(KvmixError, match=r"unknown window .*: use recent:TOKENS, rpc or none"):
        parse_window(text)


@pytest.mark.parametrize("tokens", ["1048577", "9" * 5000])
def test_windows_that_are_too_long(tokens):
    with pytest.raises(KvmixError, match="use at most recent:1048576"):
        parse_window(f"recent:{tokens}")


def test_ratios_are_shares():
    for ratio in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="at least 0 and less than 1"):
            CacheSettings(window=Rpc(ratio={2: ratio}))
