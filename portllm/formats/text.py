"""A corpus's documents in the order of their origin, streamed: file, hub data set or generator.

Documents are numbered by row, empty ones included (a text file's rows are its lines).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from portllm.errors import ResolveError
from portllm.study.generators import generate
from portllm.study.recipes import Format, Text

FORMATS: dict[str, Format] = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl", ".txt": "text"}
"""File name ending to format."""


def documents(text: Text, source: Path | None) -> Iterator[str]:
    """The documents; an empty one is an empty string. ResolveError names a missing column or an unreadable file."""
    if text.generator is not None:
        if text.documents is None:
            raise ResolveError(f"generator `{text.generator}` does not end by itself: say how many `documents`")
        return generate(text.generator, text.documents, text.seed, **text.options)
    return islice((render(row, text) for row in rows(text, source)), text.documents)


def rows(text: Text, source: Path | None) -> Iterable[Mapping[str, Any]]:
    """Rows of a file (pyarrow, batch by batch: `datasets` would import torch into a plan) or of a hub data set."""
    if text.hub is not None:
        return _hub_rows(text)
    assert source is not None
    return {"parquet": _parquet_rows, "jsonl": _jsonl_rows, "text": _text_rows}[text.format or "text"](source)


def _hub_rows(text: Text) -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset

    try:
        return load_dataset(text.hub, text.subset, split=text.split, revision=text.revision, streaming=True)
    except (OSError, ValueError) as error:
        raise ResolveError(f"corpus `{text.hub}` cannot be read from the hub: {error}") from error


def _parquet_rows(source: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ResolveError(f"{source}: cannot be read as parquet: {error}") from error


def _jsonl_rows(source: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(_lines(source), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError as error:
            raise ResolveError(f"{source}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ResolveError(f"{source}:{number}: a line must be a JSON object")
        yield row


def _text_rows(source: Path) -> Iterator[Mapping[str, Any]]:
    return ({"text": line.rstrip("\n")} for line in _lines(source))


def _lines(source: Path) -> Iterator[str]:
    try:
        with source.open(encoding="utf-8-sig") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise ResolveError(f"{source}: is not UTF-8 ({error.reason} at byte {error.start})") from None


def render(row: Mapping[str, Any], text: Text) -> str:
    """A row's document: its text column, or the template over its columns; a null is empty, and so is a row of none."""
    if not row:
        return ""
    try:
        if text.template is not None:
            return text.template.format(**{k: "" if v is None else v for k, v in row.items()})
        document = row[text.text or "text"] or ""
    except (KeyError, IndexError) as error:
        raise ResolveError(f"the corpus has no column {error}; its columns: {', '.join(row)}") from None
    except (AttributeError, ValueError, TypeError) as error:
        raise ResolveError(f"the template cannot be filled: {error}") from None
    if not isinstance(document, str):
        raise ResolveError(f"column `{text.text}` of the corpus holds {type(document).__name__}, not text")
    return document
