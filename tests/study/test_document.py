"""The study file as a document: numbers as people write them, lines in errors, overrides."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portllm.errors import SpecError
from portllm.study.document import dotted, override, parse


@pytest.mark.parametrize(
    "text, value",
    [
        ("5e-4", 5e-4),
        ("5.0e-3", 5e-3),
        ("1E3", 1e3),
        ("500_000", 500_000),
        ("3", 3),
        ("-2.5", -2.5),
        ("'5e-4'", "5e-4"),
        ("e4", "e4"),
        ("1e", "1e"),
    ],
)
def test_numbers_are_numbers_however_they_are_written(text, value):
    found = parse(f"a: {text}", "s.yaml").data["a"]
    assert found == value and type(found) is type(value)


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_every_float_python_prints_is_read_back(number):
    assert parse(f"a: {number!r}", "s.yaml").data["a"] == number


def test_a_key_that_stands_twice_is_refused_with_its_line():
    with pytest.raises(SpecError, match=r"s\.yaml:3: b\.c stands twice"):
        parse("b:\n  c: 1\n  c: 2\n", "s.yaml")


def test_what_a_mapping_takes_over_it_may_give_anew():
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: [*b, {<<: [*b, {y: 9, z: 4}]}]\n"
    data = parse(text, "s.yaml").data
    assert data["b"] == {"x": 1, "y": 3}
    assert data["c"] == [{"x": 1, "y": 3}, {"x": 1, "y": 3, "z": 4}]
    with pytest.raises(SpecError, match=r"s\.yaml:2: b\.y stands twice"):
        parse("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3, y: 4}\n", "s.yaml")


def test_broken_yaml_names_file_and_line():
    with pytest.raises(SpecError, match=r"s\.yaml:3: not valid YAML"):
        parse("a: 1\nb: [1, 2\n", "s.yaml")


@pytest.mark.parametrize("text", ["", "- a\n", "just words"])
def test_a_study_file_is_a_mapping(text):
    if text:
        with pytest.raises(SpecError, match="mapping"):
            parse(text, "s.yaml")
    else:
        assert parse(text, "s.yaml").data == {}


def test_overrides_reach_into_mappings_and_lists():
    document = parse("a: {b: 1}\nc: [{d: 1}, {d: 2}]\n", "s.yaml")
    data = override(document, ["a.b=5e-4", "c[1].d=[x, y]", "e.f=true"]).data
    assert data == {"a": {"b": 5e-4}, "c": [{"d": 1}, {"d": ["x", "y"]}], "e": {"f": True}}
    assert document.data["a"] == {"b": 1}, "the document itself does not change"


def test_names_with_dots_are_reached_as_they_are_written():
    document = parse("m:\n  llama-3: {p: 0}\n  llama-3.1-8b:\n    p: 1\n    u: [{v1.0: 2}]\n", "s.yaml")
    data = override(document, ["m.llama-3.1-8b.p=5", "m.llama-3.1-8b.u[0].v1.0=6", "m.llama-3.p=7"]).data
    assert data == {"m": {"llama-3": {"p": 7}, "llama-3.1-8b": {"p": 5, "u": [{"v1.0": 6}]}}}
    months = parse("m: {v1.05: {p: 1}, v1: {p: 2}}\nl: [{q: 1}]\n", "s.yaml")
    assert override(months, ["m.v1.05.p=3", "l.0.q=4"]).data == {
        "m": {"v1.05": {"p": 3}, "v1": {"p": 2}},
        "l": [{"q": 4}],
    }
    assert document.located("m.llama-3.1-8b.p: is wrong") == "s.yaml:4: m.llama-3.1-8b.p: is wrong"


@pytest.mark.parametrize("assignment", ["a", "=1", "a.b.c=1", "c[7].d=1", "a..b=1", "a={"])
def test_an_override_that_points_nowhere_is_refused(assignment):
    with pytest.raises(SpecError, match="-o "):
        override(parse("a: {b: 1}\nc: [{d: 1}]\n", "s.yaml"), [assignment])


def test_lines_point_at_the_value_or_its_nearest_parent():
    document = parse("a:\n  b: 1\n", "s.yaml")
    assert document.where(("a", "b")) == "s.yaml:2: a.b"
    assert document.where(("a", "x")) == "s.yaml:1: a.x"
    assert dotted(("lineages", "x", "updates", 0, "rank")) == "lineages.x.updates[0].rank"
