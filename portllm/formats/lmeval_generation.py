"""What a task's `generation_kwargs` ask for, as lm-eval's HFLM reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from portllm.errors import ResolveError
from portllm.formats.lmeval_build import quiet

_MAX_TOKENS = 256
"""HFLM's default for max_gen_toks."""
PLAIN = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0,
         "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "suppress_tokens": [], "bad_words_ids": [],
         "forced_eos_token_id": None}  # fmt: skip
"""Settings that move a greedy choice, a task's or a generation_config.json's, and their values that do not; None does
not, either."""
_IDLE = {"until", "max_gen_toks", "top_p", "top_k", "min_p", "typical_p", "early_stopping", "length_penalty",
         "use_cache"}  # fmt: skip
"""What ends a text, what only sampling or several beams read, and what saves time."""


def generation(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with `until` as a list, `max_gen_toks` whatever its alias, and whether they sample."""
    from lm_eval.models.utils import normalize_gen_kwargs

    with quiet():
        return dict(normalize_gen_kwargs(dict(arguments), _MAX_TOKENS))


def not_greedy(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that choose other tokens than the most likely ones, or end elsewhere."""
    read = generation(arguments)
    return {name: value for name, value in read.items() if name in arguments and not _keeps(name, value)}


def _keeps(name: str, value: Any) -> bool:
    if name in ("do_sample", "temperature"):
        return not value
    return name in _IDLE or (name in PLAIN and value in (None, PLAIN[name]))


def new_tokens(task: str, arguments: Mapping[str, Any]) -> int:
    """Tokens that a text may have. Raises ResolveError, naming the field, for texts this tool does not generate."""
    try:
        odd, count = not_greedy(arguments), generation(arguments)["max_gen_toks"]
    except (TypeError, ValueError) as error:
        raise ResolveError(f"task `{task}`: generation_kwargs {arguments} cannot be read: {error}") from error
    if odd:
        asked = ", ".join(f"{name}: {value!r}" for name, value in odd.items())
        raise ResolveError(f"task `{task}`: generation_kwargs ask for {asked}, and only greedy generation is supported,"
                           f" ended by until and max_gen_toks: give a definition of your own without that "
                           f"(include_path)")  # fmt: skip
    if count < 1:
        raise ResolveError(f"task `{task}`: generation_kwargs.max_gen_toks is {count}: give 1 or more")
    return int(count)
