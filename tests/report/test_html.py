"""The page: self-contained, escaped, complete, and the same for the same data."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from portllm.report import figures
from portllm.report.costs import costs
from portllm.report.html import headline, render
from portllm.report.verdicts import verdicts
from tests.report.made_up_study import MadeUp

VOID = {"meta", "br", "link", "img", "input", "hr", "path", "use", "rect", "line"}


class Balanced(HTMLParser):
    """Raises where an end tag does not close the last open one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def page(made_up: MadeUp) -> str:
    found = verdicts(made_up.rows, made_up.items, made_up.steps)
    return render(made_up.study, made_up.rows, found, made_up.steps)


def test_the_page_is_well_formed_and_starts_with_the_answer(page: str) -> None:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.headings[0].startswith("The answer")
    assert {"Main table", "What was asked", "Over versions", "What it costs", "Training curves"} <= set(parser.headings)
    assert page.index("card answer") < page.index("<h2>")


def test_the_page_loads_nothing_from_anywhere(page: str) -> None:
    assert "<script" not in page
    assert "<link" not in page
    assert "@import" not in page
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', page)
    assert not re.findall(r"url\((?!#)", page)


def test_the_page_shows_decisions_costs_and_keys(page: str, made_up: MadeUp) -> None:
    assert 'class="verdict refit"' in page
    assert 'class="verdict port"' in page
    assert all(step["key"] in page and step["label"] in page for step in made_up.steps)
    assert "24.6k" in page  # trainable parameters of a refit
    assert "torch&nbsp;2.13.0" in page
    assert page.count('role="img" aria-label="loss over optimizer steps"') == 1


def test_the_same_data_give_the_same_page(page: str, made_up: MadeUp) -> None:
    found = verdicts(made_up.rows, made_up.items, made_up.steps)
    assert render(made_up.study, made_up.rows, found, made_up.steps) == page


def test_text_of_the_study_is_escaped_everywhere(made_up: MadeUp) -> None:
    evil = '<script>alert("x")</script>$\\frac{1}{2}$& \\d'
    rows = [{**row, "task": evil, "lineage": evil, "model": evil} for row in made_up.rows if row["task"] == "easy"]
    steps = [{**step, "label": evil, "coordinates": {**step["coordinates"], "lineage": evil}} for step in made_up.steps]
    study = {
        "name": evil,
        "description": evil,
        "models": {evil: {evil: evil}},
        "store": evil,
        "libraries": {evil: evil},
    }
    page = render(study, rows, verdicts(rows[:10], made_up.items), steps)
    assert "<script" not in page
    Balanced().feed(page)


@pytest.mark.parametrize(("panels", "labelled"), [(3, [0, 1, 2]), (4, [1, 2, 3]), (5, [2, 3, 4])])
def test_every_panel_with_nothing_below_it_has_its_axis(panels: int, labelled: list[int]) -> None:
    seen: list[Any] = []

    def panel(axes: Any) -> None:
        axes.set_xlabel("version t")
        seen.append(axes)

    figures._grid([panel] * panels, "x", shared=True)
    assert [n for n, axes in enumerate(seen) if axes.get_xlabel()] == labelled


def test_a_study_without_results_has_a_page_too() -> None:
    page = render({"name": "empty"}, [], [], [])
    assert "nothing to decide yet" in page
    Balanced().feed(page)


def test_a_given_patch_shows_its_own_score_at_t_0_beside_the_refits(made_up: MadeUp) -> None:
    same = render(made_up.study, made_up.rows, verdicts(made_up.rows), made_up.steps)
    assert "the ported and the refitted patch are the same patch" in same and ">patch</span>" in same
    given = [{**row, "value": 0.123, "stderr": None, "key": "x", "seed": None} if row["arm"] == "port" else row
             for row in made_up.rows]  # fmt: skip
    other = render(made_up.study, given, verdicts(given), made_up.steps)
    assert "are the same patch" not in other and ">patch</span>" not in other and "12.3" in other


def test_what_was_warmed_up_and_not_ported_is_shown_and_not_called_absent(made_up: MadeUp) -> None:
    rows = [{**row, "arm": "warm"} for row in made_up.rows if row["arm"] == "port"]
    found = verdicts(rows, made_up.items)
    assert "port and refit were not both evaluated" in headline(found, made_up.steps)
    assert ">patch</span>" in render(made_up.study, rows, found, made_up.steps)


def test_a_study_without_refit_has_nothing_to_decide(made_up: MadeUp) -> None:
    rows = [row for row in made_up.rows if row["arm"] != "refit"]
    found = verdicts(rows, made_up.items)
    page = render(made_up.study, rows, found, [])
    assert 'class="verdict unsure"' not in page
    assert "Nothing was refitted" in page
    assert "What it costs" not in page


def test_the_headline_counts_what_the_verdicts_say(made_up: MadeUp) -> None:
    found = verdicts(made_up.rows, made_up.items, made_up.steps)
    port = sum(verdict.decision == "port" for verdict in found)
    assert f"good enough in {port} of 8 cases" in headline(found, made_up.steps)


def test_porting_costs_no_training_and_refits_are_added_up(made_up: MadeUp) -> None:
    lines = {line.name: line for line in costs(made_up.steps)}
    assert lines["port"].trainings == lines["port"].total_device_s == lines["port"].trainable_parameters == 0
    assert lines["refit"].trainings == 16
    assert lines["refit"].total_device_s == pytest.approx(16 * 10.5)
    assert lines["refit · easy"].trainings == 8
    assert lines["first patches"].trainings == 4
    assert lines["updates"].trainings == 4
    twice = costs([{**step, "devices": 2} for step in made_up.steps])
    assert next(line for line in twice if line.name == "refit").device_s == pytest.approx(21.0)
