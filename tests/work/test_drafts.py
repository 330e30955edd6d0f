"""Guesses of how a text goes on."""

from hypothesis import given
from hypothesis import strategies as st

from portllm.work.drafts import LONGEST, Draft, length

TOKENS = st.lists(st.integers(0, 4), min_size=1, max_size=40)


@given(TOKENS, TOKENS, st.integers(0, 20))
def test_a_guess_is_what_followed_the_last_place_that_ends_alike(prompt, text, count):
    draft = Draft(prompt)
    for token in text:
        draft.append(token)
    ids = prompt + text
    places = [(size, [at for at in range(size, len(ids)) if ids[at - size : at] == ids[-size:]]) for size in (3, 2, 1)]
    found = next((at for _, at in places if at), None)
    endless = ids[found[-1] :] * (count + 1) if found else []
    assert (draft.ids, draft.text) == (ids, text) and draft.guess(count) == endless[:count]


def test_a_text_that_repeats_itself_is_guessed_with_growing_trust():
    draft = Draft([1, 2, 3])
    for token in [1, 2, 3] * 20:
        draft.append(token)
    assert draft.chance > 0.95 and draft.guess(7) == [1, 2, 3, 1, 2, 3, 1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, LONGEST))
def test_as_many_tokens_are_guessed_as_pay(chances, most):
    assert 0 <= length(chances, most) <= most
    assert length([0.0] * len(chances), most) == 0
    assert length([1.0] * len(chances), most) == most
