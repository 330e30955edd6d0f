"""Nulls in a task's data that lm-eval would write into a request, as "None" or "nan".

Real data have null columns that no prompt reads, and templates that ask first (`{% if hint %}`, `hint is none`): a null
is looked for where it can be read, and refused where the document's texts show it. They show it where they are the same
with the word "None" in its place, a word that is false like the null, and others with nothing in its place. So filters
may change how it is written (`lower`, `tojson`), and what a template says for want of a value is its own matter. A NaN
is shown where the texts say "nan" more often than with 0 in its place.

Not seen: a null that is printed only where the template found it `is none`, or by a filter that treats text otherwise
than null. Refused in error: a template that itself says "None", letter for letter, where the value is missing.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from typing import Any

from portllm.formats.lmeval_build import Task
from portllm.formats.lmeval_reading import Reading

_WORD = re.compile("none|null|nan", re.IGNORECASE)
_NAN = re.compile("nan", re.IGNORECASE)


class _FalseWord(str):
    """A text that a template's `if` takes for a null."""

    def __bool__(self) -> bool:
        return False


_NULLS = (_FalseWord("None"), _FalseWord("null"))
"""As Python writes it, and JSON."""


def null_in_texts(task: Task, rows: Iterable[dict[str, Any]], read: Reading) -> tuple[int, str] | None:
    """(document, column) of the first null that enters what is read of a document; None where there is none.

    A null that a template or function of the task cannot work with enters, too.
    """
    may_read = functools.cache(functools.partial(_may_read, read))
    for number, doc in enumerate(rows):
        empty = [column for column in doc if may_read(column) and _holds_null(doc[column])]
        if empty and (column := _entering(task, doc, read, empty)):
            return number, column
    return None


def _may_read(read: Reading, column: str) -> bool:
    """Whether a template names the column; a function may read them all."""
    return any(callable(spec) or re.search(rf"\b{re.escape(column)}\b", str(spec)) for spec in read)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_null, value.values()))
    return any(map(_holds_null, value)) if isinstance(value, list) else value is None or _is_nan(value)


def _filled(value: Any, null: Any, nan: float) -> Any:
    """The value with others for every null and NaN, inside lists and structs as well."""
    if isinstance(value, dict):
        return {key: _filled(inner, null, nan) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, null, nan) for inner in value]
    return null if value is None else nan if _is_nan(value) else value


def _entering(task: Task, doc: dict[str, Any], read: Reading, empty: list[str]) -> str | None:
    said = _said(task, doc, read)
    if said is None:
        mended = (c for c in empty if _said(task, doc | {c: _filled(doc[c], "", 0.0)}, read) is not None)
        return next(mended, empty[0])
    if not _WORD.search(said):
        return None
    return next((column for column in empty if _shown(task, doc, read, column, said)), None)


def _shown(task: Task, doc: dict[str, Any], read: Reading, column: str, said: str) -> bool:
    def saying(null: Any, nan: float) -> str | None:
        return _said(task, doc | {column: _filled(doc[column], null, nan)}, read)

    without_nan = saying(None, 0.0) or ""
    if len(_NAN.findall(said)) > len(_NAN.findall(without_nan)):
        return True
    return saying("", math.nan) != said and any(saying(word, math.nan) == said for word in _NULLS)


def _said(task: Task, doc: dict[str, Any], read: Reading) -> str | None:
    """A document's texts without quotation marks, which a word in a list has and a null has not; None where they
    cannot be made."""
    try:
        return re.sub("[\"']", "", "\n".join(read.texts(task, doc)))
    except Exception:
        return None
