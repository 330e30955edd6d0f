"""Results as text: the terminal's table, and rows in three formats that say the same."""

import csv
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from portllm.errors import SpecError
from portllm.report import text
from portllm.report.table import main_table, printed, schema, write_rows
from portllm.report.verdicts import verdicts
from portllm.store.results import COLUMNS
from tests.report.made_up_study import MadeUp


def test_the_table_shows_arms_difference_and_decision(made_up: MadeUp) -> None:
    shown = printed(main_table(verdicts(made_up.rows, made_up.items, made_up.steps)))
    assert "tiny · full (acc, rank 8, merged, float32)" in shown
    assert "tiny · lora" in shown
    assert all(word in shown for word in ("none", "port−refit", "easy", "hard", "refit", "±"))


def test_the_table_fits_80_columns(made_up: MadeUp) -> None:
    assert max(map(len, printed(main_table(verdicts(made_up.rows, made_up.items)), width=80).splitlines())) <= 80


def test_square_brackets_in_names_are_no_markup(made_up: MadeUp) -> None:
    rows = [{**row, "task": "[red]odd[/red]", "lineage": "[b]"} for row in made_up.rows if row["task"] == "easy"]
    shown = printed(main_table(verdicts(rows[:5], made_up.items)))
    assert "[red]odd[/red]" in shown
    assert "[b]" in shown


def test_no_results_is_said(made_up: MadeUp) -> None:
    assert "no results yet" in printed(main_table([]))
    assert main_table([]) is not None


def test_json_is_a_list_with_every_column_in_order(made_up: MadeUp) -> None:
    stream = io.StringIO()
    write_rows(made_up.rows, "json", stream)
    back = json.loads(stream.getvalue())
    assert back == made_up.rows
    assert all(tuple(row) == COLUMNS for row in back)


def test_csv_has_a_header_and_leaves_null_empty(made_up: MadeUp, tmp_path: Path) -> None:
    write_rows(made_up.rows, "csv", tmp_path / "rows.csv")
    back = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert tuple(back[0]) == COLUMNS
    assert back[0]["rank"] == ""
    assert back[1]["patches"] == ";".join(made_up.rows[1]["patches"])
    assert [float(row["value"]) for row in back] == [row["value"] for row in made_up.rows]


def test_parquet_keeps_types_lists_and_nulls(made_up: MadeUp, tmp_path: Path) -> None:
    write_rows(made_up.rows, "parquet", tmp_path / "rows.parquet")
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table.schema.equals(schema())
    assert table.to_pylist() == made_up.rows
    write_rows([], "parquet", tmp_path / "none.parquet")
    assert pq.read_table(tmp_path / "none.parquet").schema.equals(schema())


def test_parquet_goes_to_binary_streams_only(made_up: MadeUp) -> None:
    binary = io.BytesIO()
    write_rows(made_up.rows, "parquet", binary)
    assert pq.read_table(io.BytesIO(binary.getvalue())).num_rows == len(made_up.rows)
    with pytest.raises(SpecError, match="output file"):
        write_rows(made_up.rows, "parquet", io.StringIO())
    with pytest.raises(SpecError, match="csv, json or parquet"):
        write_rows(made_up.rows, "xml", binary)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        (text.signed(0.0123), "+1.2"),
        (text.signed(-0.0004), "0.0"),
        (text.signed(-0.12), "−12.0"),
        (text.points(12.3456, 1), "12.35"),
        (text.chance(1.0), ">99%"),
        (text.chance(0.0004), "<1%"),
        (text.percent(-0.11), "−11%"),
        (text.percent(None), "–"),
        (text.seconds(3.14), "3.1 s"),
        (text.seconds(90), "90 s"),
        (text.seconds(600), "10.0 min"),
        (text.seconds(36000), "10.0 h"),
        (text.hours(10.5), "0.00292"),
        (text.count(20_971_520), "21.0M"),
        (text.size(350_610_000_000), "350.6 GB"),
        (text.described({"path": "x", "no": None, "updates": [{"rank": 8}]}), "path: x, updates: rank: 8"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_reading(written: str, value: str) -> None:
    assert written == value
