"""Nulls in a task's data that lm-eval would write into a request as the word "None".

Real data have null columns that no prompt reads, and templates that ask first (`{% if hint %}`): a null is looked for
where it can be read, and refused where the document's texts say "None" more often than with an empty text in its place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from portllm.formats.lmeval_build import Task


def null_in_texts(task: Task, rows: Iterable[dict[str, Any]]) -> tuple[int, str] | None:
    """(document, column) of the first null that enters a prompt, a target or a choice; None where there is none.

    A null that a template or function of the task cannot work with enters, too.
    """
    columns = [column for column in task.features if _may_read(task, column)]
    for number, doc in enumerate(rows):
        empty = [column for column in columns if column in doc and _holds_null(doc[column])]
        if empty and (column := _entering(task, doc, empty)):
            return number, column
    return None


def _may_read(task: Task, column: str) -> bool:
    """Whether a template names the column; a function may read them all."""
    specs = [getattr(task.config, name) for name in ("doc_to_text", "doc_to_target", "doc_to_choice", "gen_prefix")]
    return any(callable(spec) or re.search(rf"\b{re.escape(column)}\b", str(spec)) for spec in specs)


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_null, value.values()))
    return any(map(_holds_null, value)) if isinstance(value, list) else value is None


def _filled(value: Any) -> Any:
    """The value with an empty text for every null, inside lists and structs as well."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return {key: _filled(inner) for key, inner in value.items()}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value


def _entering(task: Task, doc: dict[str, Any], empty: list[str]) -> str | None:
    said = _said(task, doc)
    if not said:
        return None
    found = next((c for c in empty if said > _said(task, doc | {c: _filled(doc[c])})), None)
    return empty[0] if found is None and said == math.inf else found


def _said(task: Task, doc: dict[str, Any]) -> float:
    """How often a document's texts say "None"; without end where they cannot be made."""
    try:
        choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else []
        texts = [task.doc_to_text(doc), task.doc_to_target(doc), task.doc_to_prefix(doc) or "", *choices]
    except Exception:
        return math.inf
    return sum(str(text).count("None") for text in texts)
