"""The dropouts that a model's configuration states. A training here has none, and refuses a model that asks for one."""

from collections.abc import Mapping
from typing import Any

_ELSEWHERE = ("classifier", "summary")
"""Of heads that no language model here has: Pythia's configuration says `classifier_dropout`: 0.1."""


def dropouts(config: Mapping[str, Any]) -> dict[str, float]:
    """Those of a configuration (its `text_config`, where it has one) that are not 0, by field."""
    text = config.get("text_config")
    fields = text if isinstance(text, Mapping) and text else config
    return {name: value for name, value in fields.items() if is_dropout(name, value)}


def is_dropout(name: str, value: object) -> bool:
    """Whether a field or attribute drops something at random (`resid_pdrop`, `attention_dropout`, `layerdrop`), or
    shakes it (`router_jitter_noise`)."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and value != 0
    return number and ("drop" in name or "jitter" in name) and not name.startswith(_ELSEWHERE)
