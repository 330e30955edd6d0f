"""Results as text: the main table on a terminal, and rows as CSV, JSON or Parquet.

The paper's main table has tasks as rows and none/port/refit per version as columns. A terminal is too narrow for
several versions side by side, so there versions follow each other, one table per model, lineage and rank; the page
keeps the paper's shape.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from portllm.errors import SpecError
from portllm.report import text
from portllm.report.verdicts import Verdict, shown
from portllm.store.results import COLUMNS, FORESIGHT

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal["csv", "json", "parquet"]

INTEGERS = {"t", "update_seed", "num_fewshot", "source_t", "rank", "seed", "n"}
FLOATS = {"value", "stderr", "wall_s"}
STYLE = {"port": "bold green", "refit": "bold yellow", "unsure": "dim"}


def write_rows(
    rows: Iterable[Mapping[str, Any]],
    format: Format,
    target: str | Path | IO[Any],
    columns: Sequence[str] = COLUMNS,
) -> None:
    """Rows to a file, or to a stream (text, or binary for Parquet). JSON is a list; CSV leaves null empty."""
    ordered = [{name: row.get(name) for name in columns} for row in rows]
    data = _encoded(ordered, format, columns)
    if isinstance(target, (str, Path)):
        Path(target).write_bytes(data)
        return
    binary = target if isinstance(target, (io.RawIOBase, io.BufferedIOBase)) else getattr(target, "buffer", None)
    if binary is not None:
        target.flush()
        binary.write(data)
    elif format == "parquet":
        raise SpecError("Parquet needs a file or a binary stream: name an output file")
    else:
        target.write(data.decode())


def _encoded(rows: list[dict[str, Any]], format: Format, columns: Sequence[str]) -> bytes:
    if format == "json":
        return (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode()
    if format == "csv":
        return _csv(rows, columns).encode()
    if format == "parquet":
        return _parquet(rows, columns)
    raise SpecError(f"unknown format {format!r}: choose csv, json or parquet")


def _csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: ";".join(value) if isinstance(value, list) else value for name, value in row.items()})
    return stream.getvalue()


def _parquet(rows: list[dict[str, Any]], columns: Sequence[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema(columns)), sink)
    return bytes(sink.getvalue())


def schema(columns: Sequence[str] = COLUMNS) -> pa.Schema:
    """Arrow types of the result columns: the same for an empty study as for a full one."""
    import pyarrow as pa

    kinds: dict[str, pa.DataType] = {
        "patches": pa.list_(pa.string()),
        "primary": pa.bool_(),
        "higher_is_better": pa.bool_(),
    }
    kinds |= dict.fromkeys(INTEGERS, pa.int64()) | dict.fromkeys((*FLOATS, *FORESIGHT), pa.float64())
    return pa.schema([(name, kinds.get(name, pa.string())) for name in columns])


def main_table(verdicts: Sequence[Verdict]) -> Group:
    """The results for a terminal: one table per model, lineage, rank and apply mode, versions one below the other."""
    tables = [_block(list(members)) for _, members in groupby(verdicts, key=lambda verdict: verdict.block)]
    return Group(*tables, Text(legend(verdicts), style="dim")) if tables else Group(Text("no results yet"))


def title(verdict: Verdict, among: Sequence[Verdict]) -> str:
    """A block's name: model and lineage, and what else tells it from the other blocks."""
    parts = [verdict.model, verdict.lineage]
    if len({other.rank for other in among if other.rank is not None}) > 1 and verdict.rank is not None:
        parts.append(f"rank {verdict.rank}")
    if len({other.apply for other in among}) > 1:
        parts.append(verdict.apply)
    if len({other.dtype for other in among}) > 1:
        parts.append(verdict.dtype)
    return " · ".join(parts)


def legend(verdicts: Sequence[Verdict]) -> str:
    """What the columns mean, in a sentence a reader needs once."""
    margin = text.share(verdicts[0].margin) if verdicts else ""
    unscaled = dict.fromkeys(v.metric for v in verdicts if v.scale != 100)
    unpaired = dict.fromkeys(v.metric for v in verdicts if v.regret is not None and not v.regret.paired)
    return (
        f"Scores in points{_but(unscaled, 'as they are')} ± one standard error, means over seeds; port−refit is paired "
        f"by document{_but(unpaired, 'not paired')}. port: surely loses less than {margin} points"
        f"{_but(unscaled, f'{margin} % of the refit’s score')}. refit: surely loses something, by the estimate that "
        "much or more. unsure: neither is shown (95 % intervals over documents and seeds)."
    )


def _but(metrics: Iterable[str], words: str) -> str:
    names = ", ".join(metrics)
    return f" ({names}: {words})" if names else ""


def _block(members: Sequence[Verdict]) -> Table:
    table = Table(title=escape(f"{members[0].model} · {members[0].lineage}{_details(members)}"), title_justify="left")
    table.add_column("t", justify="right")
    table.add_column("task")
    arms = shown(members)
    for name in (*arms, "port−refit"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("decision")
    last = None
    for verdict in members:
        if last is not None and verdict.t != last:
            table.add_section()
        table.add_row(*_cells(verdict, arms, first=verdict.t != last))
        last = verdict.t
    return table


def _details(members: Sequence[Verdict]) -> str:
    _, _, rank, apply, dtype = members[0].block
    parts = [
        *dict.fromkeys(verdict.unit for verdict in members),
        f"rank {rank}" if rank is not None else "",
        apply,
        dtype,
    ]
    return f" ({', '.join(filter(None, parts))})"


def _cells(verdict: Verdict, arms: Sequence[str], first: bool) -> list[str | Text]:
    scores = [text.score(verdict.arms.get(arm), verdict.scale) for arm in arms]
    decision = Text(verdict.decision or "", style=STYLE.get(verdict.decision or "", ""))
    lead = text.difference(verdict.regret, -verdict.sign * verdict.scale) if verdict.t else ""
    return [str(verdict.t) if first else "", escape(verdict.name), *scores, lead, decision]


DIAGNOSIS = {
    "frobenius": "‖Δθ‖", "effective_rank": "eff. rank", "relative": "‖Δθ‖/‖W‖", "lost": "lost", "update_size": "update",
    "overlap_out": "overlap", "residual_of_patch": "‖R‖/‖Δθ‖", "residual_of_patched": "‖R‖/‖θₜ+Δθ‖",
}  # fmt: skip
"""Columns of the table of diagnoses."""


def diagnosis_table(rows: Sequence[Mapping[str, Any]]) -> Group:
    """What the weights alone say of each ported patch, for a terminal: one table per model and lineage."""
    if not rows:
        return Group(Text("no diagnoses yet"))
    tables = []
    known = {"rank": "r", "seed": "s"} | ({"update_seed": "u"} if len({row["update_seed"] for row in rows}) > 1 else {})
    for name, members in groupby(rows, key=lambda row: (row["model"], row["lineage"])):
        table = Table(title=escape(" · ".join(name)), title_justify="left")
        table.add_column("t", justify="right")
        table.add_column("patch")
        for words in DIAGNOSIS.values():
            table.add_column(words, justify="right", no_wrap=True)
        for row in sorted(members, key=lambda row: (row["update_seed"] or 0, row["t"])):
            table.add_row(str(row["t"]), escape(_patch_name(row, known)), *(_number(row[name]) for name in DIAGNOSIS))
        tables.append(table)
    words = (
        "W: the patched weights. lost: what rounding to the stored dtype changes of Δθ. update: ‖θₜ−θ₀‖/‖θ₀‖, all "
        "weights. overlap: share of the update inside the patch's output space. R = refit − port."
    )
    return Group(*tables, Text(words, style="dim"))


def _patch_name(row: Mapping[str, Any], known: Mapping[str, str]) -> str:
    return " ".join([row["task"], *(f"{word}{row[name]}" for name, word in known.items() if row[name] is not None)])


def _number(value: float | None) -> str:
    return text.NOTHING if value is None else f"{value:.3g}"


def printed(shown: Group, width: int = 100) -> str:
    """Tables as plain text, for logs and tests."""
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=False, color_system=None).print(shown)
    return stream.getvalue()
