"""Identity: a step's key is the sha256 of what can change its output, and of nothing else.

key = sha256(canonical JSON of {stage, version, recipe, inputs}). Recipes are frozen dataclasses; a field that equals
its default is left out, so that a field added later, with a default, keeps old keys. Anything without a stable
form (a set, a path, a default repr, NaN) raises.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from portllm.errors import SpecError

STAGE_VERSIONS = {
    "base": 5,
    "corpus": 2,
    "requests": 1,
    "update": 5,
    "finetune": 5,
    "evaluate": 7,
    "export": 1,
    "diagnose": 1,
}
"""Bump a stage's integer when its code changes the output for the same recipe; never hash source text."""


def canonical(value: Any) -> Any:
    """The JSON form of a recipe value: dataclasses without defaults, tuples as lists, mappings with string keys."""
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise SpecError(f"{value} is not a number that a recipe can hold")
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: canonical(v) for f in fields(value) if not _is_default(f, v := getattr(value, f.name))}
    if isinstance(value, Mapping):
        if not all(isinstance(k, str) for k in value):
            raise TypeError("a mapping in a recipe needs string keys")
        return {k: canonical(value[k]) for k in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [canonical(v) for v in value]
    raise TypeError(f"{type(value).__name__} has no stable form for a key")


def _is_default(field: Any, value: Any) -> bool:
    if field.default is not MISSING:
        return bool(field.default == value and type(field.default) is type(value))
    return field.default_factory is not MISSING and bool(field.default_factory() == value)


def payload(stage: str, recipe: Any, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What is hashed for a step; kept in its record, so that two keys can be compared field by field."""
    return {
        "stage": stage,
        "version": STAGE_VERSIONS[stage],
        "recipe": canonical(recipe),
        "inputs": dict(sorted(inputs.items())),
    }


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form, as 64 hex digits."""
    return _sha256(canonical(value))


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def step_key(stage: str, recipe: Any, inputs: Mapping[str, str]) -> str:
    """Key of a step: 64 hex digits."""
    return _sha256(payload(stage, recipe, inputs))


def given_key(what: str, content: str) -> str:
    """Key of something a user handed in (a model, a patch, a corpus file), from its content digest."""
    return digest({"given": what, "content": content})
