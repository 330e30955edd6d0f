"""From a plan and its store to what is shown: the table, the rows, the page."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm import __version__
from portllm.errors import SpecError
from portllm.report.verdicts import Verdict, verdicts
from portllm.store.results import COLUMNS, COORDINATES, FORESIGHT, diagnoses, items, rows, trainings
from portllm.store.store import Store
from portllm.study.keys import digest
from portllm.study.spec import Study
from portllm.study.steps import Plan

if TYPE_CHECKING:
    from rich.console import Group

_LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "ray", "lm_eval", "datasets", "mlflow")


def print_results(study: Study, plan: Plan, store: Store, format: str, output: Path | None) -> None:
    """The main table on a terminal, or the rows in a format, to `output` or standard output."""
    from portllm.report.table import main_table

    _print(format, output, lambda: main_table(study_verdicts(study, plan, store)), rows(plan.cells, store), COLUMNS)


def print_diagnoses(study: Study, plan: Plan, store: Store, format: str, output: Path | None) -> None:
    """What the weights alone say of every ported patch, in the same forms."""
    from portllm.report.table import diagnosis_table

    if not plan.diagnoses:
        raise SpecError(f"study {study.name} asks for no diagnosis: add `diagnose: true`, and run it")
    found = diagnoses(plan, store)
    _print(format, output, lambda: diagnosis_table(found), found, (*COORDINATES, *FORESIGHT, "key"))


def _print(
    format: str,
    output: Path | None,
    table: Callable[[], Group],
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
) -> None:
    from portllm.report.table import printed, write_rows

    if format == "table":
        text = printed(table(), width=_width())
        output.write_text(text) if output else print(text)
    elif format in ("csv", "json", "parquet"):
        if format == "parquet" and output is None and sys.stdout.isatty():
            raise SpecError("--format parquet is not for a terminal: add --output FILE")
        target: Any = output or (sys.stdout.buffer if format == "parquet" else sys.stdout)
        write_rows(rows, format, target, columns)  # type: ignore[arg-type]
    else:
        raise SpecError(f"--format {format}: one of table, csv, json, parquet")


def write_report(study: Study, plan: Plan, store: Store, path: Path, command: str) -> Path:
    """Write the page; returns its path. `command`: what makes this very study again."""
    from portllm.report.html import render

    # Before the rows are read: what is published in between makes the page stale, not wrong.
    facts = _facts(study, store, command) | {"identity": _identity(study, plan, store)}
    found = rows(plan.cells, store)
    page = render(facts, found, study_verdicts(study, plan, store), trainings(plan, store))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def report_path(study: Study, store: Store) -> Path:
    """Where a study's page lies in its store."""
    return store.paths.study(study.name) / "report.html"


def write_outcome(study: Study, plan: Plan, store: Store, command: str) -> list[Path]:
    """What a run leaves for its user in the store: the rows and the page. Nothing while no cell is published."""
    from portllm.report.table import write_rows

    found = rows(plan.cells, store)
    if not found:
        return []
    page = write_report(study, plan, store, report_path(study, store), command)
    table = page.with_name("results.parquet")
    write_rows(found, "parquet", table)
    return [table, page]


def is_current(study: Study, plan: Plan, store: Store) -> bool:
    """Whether rows and page in the store are of this study, which may have been edited, and of all its results."""
    path = report_path(study, store)
    if not (path.is_file() and path.with_name("results.parquet").is_file()):
        return False
    return _identity(study, plan, store) in path.read_text(encoding="utf-8", errors="replace")[:4000]


def _identity(study: Study, plan: Plan, store: Store) -> str:
    """What rows and page depend on."""
    published = store.published(step.stage for step in plan.steps.values()) & plan.steps.keys()
    return digest({"study": study.model_dump(mode="json"), "steps": sorted(plan.steps), "published": sorted(published)})


def study_verdicts(study: Study, plan: Plan, store: Store) -> list[Verdict]:
    """Port or refit, for every patch and version of the study that has results."""
    return verdicts(
        rows(plan.cells, store), lambda key: items(store, key), trainings(plan, store), margin=study.report.margin
    )


def _facts(study: Study, store: Store, command: str) -> dict[str, Any]:
    """What the page says was asked."""
    shown = study.model_dump(exclude_defaults=True, exclude_none=True)
    return {
        "name": study.name,
        "models": shown["models"],
        "lineages": shown["lineages"],
        "tasks": [t.task for t in study.tasks],
        "arms": study.arms,
        "fine-tuning": shown.get("finetune", {}),
        "store": store.root.name,
        "libraries": {"portllm": __version__} | {name: version(name) for name in _LIBRARIES},
        "command": command,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _width() -> int:
    import shutil

    return max(80, shutil.get_terminal_size((110, 24)).columns)
