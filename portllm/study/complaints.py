"""Validation errors in words: file, line, field, and the nearest known name."""

import difflib
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from portllm.study.document import Document, Location


def complaint(error: Any, document: Document, root: type[BaseModel]) -> str:
    """One of pydantic's errors as a sentence that names file, line and field."""
    location = tuple(p for p in error["loc"] if isinstance(p, int) or not _is_noise(p))
    if error["type"] == "extra_forbidden":
        close = did_you_mean(str(location[-1]), _siblings(root, location))
        return f"{document.where(location)}: unknown key{close}"
    text = str(error["msg"]).removeprefix("Value error, ")
    shown = error.get("input")
    given = f" (found {shown!r})" if isinstance(shown, (str, int, float, bool)) or shown is None else ""
    return f"{document.where(location)}: {text[0].lower()}{text[1:]}{given if error['type'] != 'missing' else ''}"


def _is_noise(part: str) -> bool:
    return part.startswith(("function-", "list[", "constrained-", "nullable", "union"))


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A hint for a word that is not known: the nearest, or all."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(sorted(known))}" if known else ""


def _siblings(root: type[BaseModel], location: Location) -> list[str]:
    """Field names of the model that holds a location."""
    kind: Any = root
    for part in location[:-1]:
        kind = _inside(kind, part)
        if kind is None:
            return []
    return list(kind.model_fields)


def _inside(kind: Any, part: str | int) -> Any:
    """The model class found at `part` of a model class, through lists, dictionaries and optional values."""
    if isinstance(kind, type) and issubclass(kind, BaseModel) and part in kind.model_fields:
        return _model_in(kind.model_fields[str(part)].annotation)
    return kind


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is not None:
        return next((m for a in get_args(annotation) if (m := _model_in(a)) is not None), None)
    return None
