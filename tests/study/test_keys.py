"""Keys: only what can change a number is in them."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portllm.study import recipes as r
from portllm.study.keys import canonical, digest, step_key

UPDATE = r.Update(
    method="lora",
    tokens=100,
    sequence_length=8,
    lora=r.Lora(4, 8.0),
    optimization=r.Optimization(learning_rate=1e-3, batch=2, seed=0),
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def test_a_key_is_stable_across_releases():
    """A change of this value orphans what users computed: bump a stage's version on purpose, never by accident."""
    key = step_key("update", UPDATE, {"root": "a", "corpus": "b"})
    assert key == "9d11b7cd078518f8e5b7d88ad8696c05725f92cef455580246edf1ea2cd0d327"


@given(JSON)
def test_a_digest_ignores_the_order_of_keys(value):
    def reversed_keys(v):
        if isinstance(v, dict):
            return {k: reversed_keys(v[k]) for k in reversed(list(v))}
        return [reversed_keys(x) for x in v] if isinstance(v, list) else v

    assert digest(value) == digest(reversed_keys(value))


def test_a_new_field_with_its_default_keeps_old_keys():
    @dataclass(frozen=True)
    class Old:
        a: int

    @dataclass(frozen=True)
    class New:
        a: int
        b: float = 0.5
        c: dict = field(default_factory=dict)

    assert digest(Old(1)) == digest(New(1)) != digest(New(1, b=0.6))


def test_a_default_of_another_type_is_not_the_default():
    @dataclass(frozen=True)
    class Recipe:
        a: float = 1.0
        b: bool = False

    assert canonical(Recipe(1, 0)) == {"a": 1, "b": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 101},
        {"start": 100},
        {"method": "full"},
        {"lora": r.Lora(8, 8.0)},
        {"optimization": r.Optimization(learning_rate=1e-3, batch=2, seed=1)},
        {"optimization": r.Optimization(learning_rate=1e-3, batch=2, seed=0, dtype="bfloat16")},
    ],
)
def test_whatever_changes_a_number_changes_the_key(change):
    inputs = {"root": "a", "corpus": "b"}
    assert step_key("update", UPDATE, inputs) != step_key("update", replace(UPDATE, **change), inputs)


def test_inputs_and_their_roles_are_in_the_key():
    keys = {step_key("update", UPDATE, i) for i in ({"root": "a"}, {"root": "b"}, {"delta1": "a"})}
    assert len(keys) == 3


@pytest.mark.parametrize("value", [{1, 2}, object(), float("nan"), float("inf"), b"x", {1: 2}])
def test_what_has_no_stable_form_is_refused(value):
    with pytest.raises((TypeError, ValueError)):
        canonical(value)
