"""Strips of blocks: a number as a share of the largest, also where no block characters can be shown."""

import pytest

from kvmix_cli.reporting.words import blocks


@pytest.mark.parametrize(
    ("value", "strip"), [(8, "████████"), (4, "████"), (4.5, "████▌"), (0, ""), (-1, ""), (99, "████████")]
)
def test_strips(value, strip):
    assert blocks(value, 8, width=8) == strip


def test_strips_of_nothing():
    assert blocks(0, 0) == ""


def test_strips_without_block_characters():
    assert blocks(1, 1, ascii_only=True) == "############"
    assert blocks(1, 2, width=4, ascii_only=True) == "##"
