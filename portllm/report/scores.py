"""Scores of patches without a study: rows with the columns of `portllm results`, and as text. Plain values in."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from portllm.errors import StageError
from portllm.report import text
from portllm.store.results import COLUMNS


class Summed(Protocol):
    """One patch (or none) on one task or group, as `work.cells` and `work.groups` yield it."""

    @property
    def patch(self) -> Path | None: ...
    @property
    def rank(self) -> int | None: ...
    @property
    def task(self) -> str: ...
    @property
    def summary(self) -> dict[str, Any]: ...


class Scored(Summed, Protocol):
    """That of a task, with its documents."""

    @property
    def items(self) -> Any: ...


def score_rows(model: str, apply: str, dtype: str, found: Iterable[Summed]) -> list[dict[str, Any]]:
    """One row per task or group and metric; a metric bears its filter's name where the task has several filters."""
    return [row for scored in found for row in _rows(model, apply, dtype, scored)]


def _rows(model: str, apply: str, dtype: str, scored: Summed) -> Iterable[dict[str, Any]]:
    several = len({metric["filter"] for metric in scored.summary["metrics"]}) > 1
    for metric in scored.summary["metrics"]:
        known = {
            "model": model,
            "task": scored.task,
            "num_fewshot": scored.summary["num_fewshot"],
            "arm": "port" if scored.patch else "none",
            "rank": scored.rank,
            "patches": [str(scored.patch)] if scored.patch else [],
            "apply": apply if scored.patch else "merged",
            "dtype": dtype,
            **metric,
            "metric": f"{metric['metric']},{metric['filter']}" if several else metric["metric"],
            "n": scored.summary["n"],
            "wall_s": scored.summary["score_s"],
        }
        yield {name: known.get(name) for name in COLUMNS}


def score_notes(found: Sequence[Summed], num_fewshot: int | None = None) -> Iterator[str]:
    """What a reader of the scores must know: shots that are not those asked for (`num_fewshot`), prompts cut to the
    window, batches that did not fit into memory."""
    shots = {scored.task: scored.summary["num_fewshot"] for scored in found}
    for task, own in shots.items():
        if num_fewshot not in (None, own):
            yield f"note: {task}: its definition says num_fewshot {own}, and lm-eval keeps to that"
    for scored in found:
        cell = f"{scored.task}{f' with {scored.patch}' if scored.patch else ''}"
        if cut := scored.summary.get("truncated"):
            yield f"note: {cell}: {cut} requests were cut from the left to fit the model's window"
        if halved := scored.summary.get("halved"):
            yield f"note: {cell}: memory ran out {halved} times, and less was done at once"


def write_items(found: Iterable[Scored], draft: Path, file: Path) -> None:
    """Every document's scores, with its task and patch, into `draft`. StageError names `file`, its name to be."""
    import pyarrow as pa
    import pyarrow.parquet

    tables = []
    for scored in found:
        patch = str(scored.patch) if scored.patch else None
        about = {"task": scored.task, "patch": patch}
        table = scored.items
        for number, (name, value) in enumerate(about.items()):
            table = table.add_column(number, name, pa.array([value] * len(table), pa.string()))
        tables.append(table)
    try:
        pyarrow.parquet.write_table(pa.concat_tables(tables), draft, compression="zstd")
    except OSError as error:
        raise StageError(f"{file}: the items cannot be written: {error}") from error


def score_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per cell and metric; patches by the shortest end of their paths that tells them apart."""
    names = _names(dict.fromkeys(patch for row in rows for patch in row["patches"]))
    lines = [("task", "patch", "metric", "value", "stderr", "n")]
    for row in rows:
        patch = names[row["patches"][0]] if row["patches"] else text.NOTHING
        value, stderr = (text.NOTHING if row[name] is None else f"{row[name]:.4f}" for name in ("value", "stderr"))
        lines.append((row["task"], patch, row["metric"], value, stderr, str(row["n"])))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            f"{word:{'<' if n < 3 else '>'}{width}}" for n, (word, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _names(paths: Iterable[str]) -> dict[str, str]:
    parts = {path: Path(path).resolve().parts for path in paths}
    for size in range(1, max(map(len, parts.values()), default=0) + 1):
        ends = {path: "/".join(found[-size:]) for path, found in parts.items()}
        if len(set(ends.values())) == len(ends):
            return ends
    return {path: path for path in parts}
