"""What was recalled by where it stood, from plain records."""

import json

import forking
import pytest

from kvmix_cli.evaluation.grid import RecallCell, grid


def record(context, *answers):
    """`answers` are (depth, distance, recalled)."""
    keys = ("depth", "distance", "recalled")
    return {"tokens": 1, "context": context, "answers": [dict(zip(keys, answer, strict=True)) for answer in answers]}


def test_rows_are_the_depths_and_columns_the_contexts_and_every_value_is_counted_once():
    found = grid(
        [
            record(1024, (0.0, 1000, True)),
            record(512, (0.5, 250, False)),
            record(512, (0.5, 251, True)),
            record(512, (1.0, 12, True)),
            record(1024, (0.0, 1001, True)),
        ]
    )
    assert found.rows == ("0%", "50%", "100%")
    assert found.columns == ("512", "1024")
    assert (found.down, found.across) == ("depth", "context (tokens)")
    assert found.cells == ((None, RecallCell(2, 2)), (RecallCell(1, 2), None), (RecallCell(1, 1), None))
    assert found.cells[1][0].share == 0.5


def test_depths_that_are_not_evenly_spaced_are_put_into_tenths():
    found = grid([record(512, (0.13, 400, True)), record(1024, (0.39, 600, False)), record(512, (0.1999, 390, True))])
    assert found.rows == ("10-20%", "20-30%", "30-40%"), "also the empty one between two others"
    assert found.cells == ((RecallCell(2, 2), None), (None, None), (None, RecallCell(0, 1)))


def test_the_very_end_belongs_to_the_last_tenth():
    found = grid([record(512, (0.97, 20, True)), record(1024, (1.0, 12, True))])
    assert found.rows == ("90-100%",)


def test_each_of_ten_evenly_spaced_depths_keeps_a_row_of_its_own_when_some_are_missing():
    found = grid([record(512, (number / 9, 100, True)) for number in (0, 1, 2, 5, 8, 9)])
    assert len(found.rows) == 10
    assert [row[0] is None for row in found.cells] == [n not in (0, 1, 2, 5, 8, 9) for n in range(10)]


def test_with_one_context_and_several_questions_columns_are_distances():
    answers = [(place / 1000, 1000 - place, place < 300) for place in range(0, 500, 20)]
    found = grid([record(1024, *answers)])
    assert found.across == "distance (tokens)"
    assert found.columns[0] == "512-575"
    assert found.columns[-1] == "960-1023"
    assert len(found.columns) <= 10
    assert sum(cell.count for row in found.cells for cell in row if cell) == len(answers)
    assert sum(cell.recalled for row in found.cells for cell in row if cell) == 15
    assert found.cells[0][-1] == RecallCell(3, 3), "the first tenth, 960 to 1000 tokens away"


def test_a_distance_stands_in_the_column_that_names_it():
    for distance in (1, 9, 10, 63, 64, 1000):
        found = grid([record(512, (0.2, distance, True), (0.3, 17, False))])
        low, high = (int(edge) for edge in found.columns[-1 if distance > 17 else 0].split("-"))
        assert low <= distance <= high


def test_with_one_context_and_one_question_there_is_one_column():
    found = grid([record(512, (0.0, 500, True)), record(512, (1.0, 12, False))])
    assert found.columns == ("512",)
    assert found.cells == ((RecallCell(1, 1),), (RecallCell(0, 1),))


def test_without_places_there_is_no_grid():
    assert grid([]) is None
    assert grid([{"tokens": 3, "nll": 1.0}]) is None
    assert grid([{"context": 512, "answers": [{"recalled": True, "distance": 3}]}]) is None
    assert grid([{"answers": [{"recalled": True, "distance": 3, "depth": 0.5}]}]) is None


def test_records_that_were_written_and_read_again_give_the_same_grid():
    records = [record(512, (n / 9, 400 - n, bool(n % 2))) for n in range(10)]
    assert grid(json.loads(json.dumps(records))) == grid(records)


@pytest.mark.slow
def test_it_needs_no_torch():
    code = "import sys, kvmix_cli.evaluation.grid; sys.exit('torch' in sys.modules)"
    assert forking.run(code=code, imports=forking.LIGHT).returncode == 0
