"""The command line: each command imports what it needs, and nothing else.

Exit codes: 0 done; 1 something failed while running; 2 the request is wrong and nothing was spent; 130
interrupted; 141 nobody reads what is printed; 143 told to end.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portllm import __version__
from portllm.cli_patches import app as patches
from portllm.errors import EngineError, PortllmError, ResolveError, SpecError
from portllm.terminal import Json, print_json

if TYPE_CHECKING:
    from portllm.store.store import Store
    from portllm.study.facts import Facts
    from portllm.study.spec import Study
    from portllm.study.steps import Plan, Step

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Port LoRA patches across updates of their base model, or learn when to refit them.",
)

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="Study file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("-o", "--override", metavar="FIELD=VALUE", help="Override a field: -o finetune.rank=16 (repeatable)."),
]
StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store", metavar="DIR", envvar="PORTLLM_STORE", help="Where results are kept. Default: ./portllm-store."
    ),
]
StepName = Annotated[str, typer.Argument(metavar="LABEL|KEY", help="A step of the plan.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with its exit code."""
    before = signal.signal(signal.SIGTERM, partial(_told_to_end, os.getpid()))
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
        sys.stdout.flush()
    except (SpecError, ResolveError) as error:
        _end(error, 2)
    except PortllmError as error:
        _end(error, 1)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        code = _unread()
    except SystemExit as ended:
        if not isinstance(ended.__context__, BrokenPipeError):
            raise
        code = _unread()  # typer has made an exit of it
    except OSError as error:
        _end(f"{error.filename or 'input/output'}: {error.strerror or error}", 1)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())  # type: ignore[attr-defined]
            sys.exit(2)
        if hasattr(error, "format_message"):  # the command line's own complaint about an argument
            _end(error.format_message(), 2)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code == 130:
        print(
            "stopped; what was published or printed is kept, and the same command goes on, or begins again",
            file=sys.stderr,
        )
    sys.exit(code if isinstance(code, int) else 0)


def _told_to_end(process: int, number: int, _: object) -> None:
    """An exit that clears scratch directories; a process forked from it (a pool's) ends at once, as it would alone."""
    if os.getpid() != process:
        os._exit(128 + number)
    sys.exit(128 + number)


def _unread() -> int:
    """The exit code where nobody reads what is printed; what is still to be printed goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 128 + signal.SIGPIPE


def _end(error: object, code: int) -> None:
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"portllm {__version__}")
        raise typer.Exit


# --- the study


@app.command()
def schema() -> None:
    """Print the JSON Schema of a study file, for editors."""
    from portllm.study.schema import json_schema

    print_json(json_schema())


@app.command()
def plan(study: StudyFile, override: Overrides = None, store: StoreOption = None, json: Json = False) -> None:
    """Show what a study would run, what exists already, and what the rest will cost."""
    from portllm.report.plan_text import plan_json, plan_text

    asked, facts, planned = _planned(study, override)
    kept = _store(asked, study, store)
    published = kept.published(step.stage for step in planned.steps.values())
    if json:
        print_json(plan_json(planned, published))
    else:
        print(plan_text(planned, facts, published, str(kept.root)))


@app.command()
def lock(study: StudyFile, override: Overrides = None) -> None:
    """Pin the study's hub ids to commits: writes STUDY.lock.json beside it. Needs the hub."""
    from portllm.resolve.lock import write_lock
    from portllm.resolve.resolver import open_study

    _, facts = open_study(study, override or [])
    if not facts.unpinned:
        print("every hub id is pinned")
        return
    print(f"wrote {write_lock(study, list(facts.unpinned))}")


@app.command()
def status(study: StudyFile, override: Overrides = None, store: StoreOption = None, json: Json = False) -> None:
    """Show which steps of a study exist, which failed and which are missing."""
    from portllm.report.plan_text import status_json, status_text

    asked, _, planned = _planned(study, override)
    kept = _store(asked, study, store)
    published = kept.published(step.stage for step in planned.steps.values())
    failed = {k: f[-1] for k in planned.steps if k not in published and (f := kept.failures(k))}
    if json:
        print_json(status_json(planned, published, failed))
    else:
        print(status_text(planned, published, failed))


@app.command()
def run(
    study: StudyFile,
    override: Overrides = None,
    store: StoreOption = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join; default RAY_ADDRESS, else a local Ray.", metavar="ADDRESS")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Run a study: what is published is skipped, what fails does not stop the rest, the same command continues."""
    from portllm.report.plan_text import plan_text

    asked, facts, planned = _planned(study, override)
    _require_pinned(planned, study)
    kept = _store(asked, study, store)
    _require_room(planned, kept, address)
    kept.create().recover()
    published = kept.published(step.stage for step in planned.steps.values())
    missing = [step for key, step in planned.steps.items() if key not in published]
    if not json and missing and not yes and sys.stdin.isatty():
        print(plan_text(planned, facts, published, str(kept.root)))
        typer.confirm("Run it?", abort=True, default=True)
    command = _command(study, override)
    report = _run(asked, planned, kept, missing, address, json, command)
    if json:
        print_json(report | {"study": planned.name, "published_before": len(published & planned.steps.keys())})
    if report["failed"]:
        raise typer.Exit(1)


def _run(
    asked: Study, planned: Plan, kept: Store, missing: list[Step], address: str | None, quiet: bool, command: str
) -> Any:
    """Execute the missing steps; a finished study starts neither Ray nor MLflow."""
    from portllm.engine.start import nothing_to_do, run_plan
    from portllm.report.build import is_current, write_outcome

    if missing:
        return run_plan(asked, planned, kept, address, quiet, lambda: write_outcome(asked, planned, kept, command))
    if not quiet:
        print(f"{planned.name}: all {len(planned.steps)} steps are published", file=sys.stderr)
    # Edited since, or the last of them was published by a run that was killed right after, a step, another study.
    if not is_current(asked, planned, kept):
        from portllm.track.study import rebuild_study

        write_outcome(asked, planned, kept, command)
        for warning in rebuild_study(asked, planned, kept)[1]:
            print(f"tracking: {warning}", file=sys.stderr)
    return nothing_to_do()


def _command(study: Path, override: list[str] | None) -> str:
    """What makes the very same study again."""
    import shlex

    return shlex.join(["portllm", "run", study.name, *(part for o in override or [] for part in ("-o", o))])


@app.command()
def step(
    study: StudyFile,
    which: StepName,
    override: Overrides = None,
    store: StoreOption = None,
) -> None:
    """Run one step in this process, without Ray: under a debugger, for example."""
    from portllm.engine.local import run_step

    asked, _, planned = _planned(study, override)
    _require_pinned(planned, study)
    kept = _store(asked, study, store).create()
    outcome = run_step(_one_step(planned, which), planned, kept)
    if outcome.failure:
        raise EngineError(f"{outcome.failure.type}: {outcome.failure.message}; log: {outcome.failure.log}")
    print_json(outcome.summary)


@app.command()
def explain(
    study: StudyFile,
    which: StepName,
    override: Overrides = None,
    store: StoreOption = None,
) -> None:
    """Show what a step's key is made of, and how it differs from published steps of the same label."""
    from portllm.report.plan_text import differences

    asked, _, planned = _planned(study, override)
    chosen, kept = _one_step(planned, which), _store(asked, study, store)
    print_json(
        {
            "key": chosen.key,
            "label": chosen.label,
            "payload": chosen.payload(),
            "published": kept.has(chosen.stage, chosen.key),
            "differs": differences(chosen, kept),
        }
    )


# --- what came out


@app.command()
def results(
    study: StudyFile,
    override: Overrides = None,
    store: StoreOption = None,
    format: Annotated[str, typer.Option(help="table, csv, json or parquet.")] = "table",
    output: Annotated[Path | None, typer.Option("--output", help="File; parquet needs one.", metavar="FILE")] = None,
    diagnose: Annotated[
        bool, typer.Option("--diagnose", help="What the weights alone say of each ported patch, instead of scores.")
    ] = False,
) -> None:
    """Print the result table: one row per cell and metric."""
    from portllm.report.build import print_diagnoses, print_results

    asked, _, planned = _planned(study, override)
    show = print_diagnoses if diagnose else print_results
    show(asked, planned, _store(asked, study, store), format, output)


@app.command()
def report(
    study: StudyFile,
    override: Overrides = None,
    store: StoreOption = None,
    output: Annotated[Path | None, typer.Option("--output", metavar="FILE", help="Default: in the store.")] = None,
) -> None:
    """Write the report: one self-contained HTML page."""
    from portllm.report.build import report_path, write_report

    asked, _, planned = _planned(study, override)
    kept = _store(asked, study, store)
    print(write_report(asked, planned, kept, output or report_path(asked, kept), _command(study, override)))


@app.command()
def track(study: StudyFile, override: Overrides = None, store: StoreOption = None) -> None:
    """Rebuild the study's MLflow runs from the store; what is there already stays."""
    from portllm.track.study import rebuild_study

    asked, _, planned = _planned(study, override)
    said, warnings = rebuild_study(asked, planned, _store(asked, study, store))
    for warning in warnings:
        print(f"error: {warning}", file=sys.stderr)
    if warnings:
        raise typer.Exit(1)
    print(said)


@app.command()
def verify(
    study: Annotated[
        Path, typer.Argument(metavar="STUDY|PATCH", help="Study file, or a patch's directory.", show_default=False)
    ],
    override: Overrides = None,
    store: StoreOption = None,
) -> None:
    """Check every published file of a study, or every file of a patch, against its sha256."""
    from portllm.errors import StoreError
    from portllm.store.store import verify as verify_artifact

    if study.is_dir():
        _verify_patch(study)
        return
    if not study.exists():
        raise SpecError(f"{study}: no such study file or patch directory")
    asked, _, planned = _planned(study, override)
    kept = _store(asked, study, store)
    there = kept.published(step.stage for step in planned.steps.values())
    published, bad = [step for key, step in planned.steps.items() if key in there], []
    for step in published:
        directory = kept.path(step.stage, step.key)
        try:
            names = verify_artifact(directory, kept.record(step.stage, step.key))
        except StoreError as error:
            bad.append(f"{error} ({step.label})")
        else:
            bad += [f"{directory / name}: differs from its record ({step.label})" for name in names]
    if bad:
        raise StoreError("\n".join([*bad, "remove these directories, and the next `portllm run` makes them again"]))
    print(f"{len(published)} published steps are intact")


def _verify_patch(patch: Path) -> None:
    from portllm.errors import StoreError
    from portllm.work.provenance import altered

    if bad := altered(patch):
        raise StoreError("\n".join(f"{patch / name}: differs from the patch's provenance" for name in bad))
    print(f"{patch} is intact")


app.add_typer(patches)

# --- a cluster

Address = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="URL", help="Dashboard of the Ray cluster; default RAY_API_SERVER_ADDRESS or RAY_ADDRESS."
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="As printed by submit and jobs.")]


@app.command()
def submit(
    study: StudyFile,
    override: Overrides = None,
    store: StoreOption = None,
    address: Address = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="Upload nothing: the cluster sees this file system.")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Show the job's log until it ends.")] = False,
) -> None:
    """Submit a study to a Ray cluster through its Jobs API; prints the job's id."""
    from portllm.engine import submit as cluster

    chosen = str(store) if store else None
    print(cluster.submit(study, address=address, store=chosen, overrides=override or [], shared=shared, follow=follow))


@app.command()
def jobs(address: Address = None, json: Json = False) -> None:
    """List the cluster's jobs, newest first."""
    from portllm.engine import submit as cluster

    found = cluster.jobs(address)
    if json:
        print_json([vars(job) | {"wall_s": job.wall_s} for job in found])
        return
    for job in found:
        wall = f"{job.wall_s:.0f} s" if job.wall_s is not None else "-"
        print(f"{job.id}  {job.status:<9}  {wall:>8}  {job.study}")


@app.command()
def logs(
    job: JobId,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job ends.")] = False,
) -> None:
    """Print a job's log."""
    from portllm.engine import submit as cluster

    cluster.logs(job, address, follow=follow)


@app.command()
def cancel(job: JobId, address: Address = None) -> None:
    """Stop a job; what it published stays."""
    from portllm.engine import submit as cluster

    print(f"{job}: {'asked to stop' if cluster.cancel(job, address) else 'had ended already'}")


# --- helpers


def _planned(file: Path, overrides: list[str] | None) -> tuple[Study, Facts, Plan]:
    from portllm.resolve.resolver import open_study
    from portllm.study.document import override, parse
    from portllm.study.plan import make_plan

    study, facts = open_study(file, overrides or [])
    try:
        return study, facts, make_plan(study, facts)
    except SpecError as error:
        document = override(parse(file.read_text(encoding="utf-8"), str(file)), overrides or [])
        raise SpecError(document.located(str(error))) from None


def _store(study: Study, file: Path, option: Path | None) -> Store:
    """`--store` or PORTLLM_STORE, else the study's, else ./portllm-store."""
    from portllm.store.store import Store

    chosen = option or (file.parent / Path(study.store).expanduser() if study.store else Path("portllm-store"))
    if ":/" in str(chosen):
        raise SpecError(f"store {chosen}: a store is a directory; object storage is not supported yet")
    if chosen.exists() and not chosen.is_dir():
        raise SpecError(f"store {chosen}: is a file; a store is a directory")
    return Store(chosen)


def _require_room(planned: Plan, kept: Store, address: str | None) -> None:
    """On this machine alone: a step that it cannot hold is refused before anything is started or written."""
    from portllm.engine.pool import Budget
    from portllm.engine.schedule import require_fits

    if not address and not os.environ.get("RAY_ADDRESS"):
        done = kept.published(step.stage for step in planned.steps.values())
        for step in planned.steps.values():
            if step.key not in done:
                require_fits(step, Budget.of_this_machine())


def _require_pinned(planned: Plan, file: Path) -> None:
    if planned.unpinned:
        raise SpecError(f"{file}: not pinned to a commit: {', '.join(planned.unpinned)}; run `portllm lock {file}`")


def _one_step(planned: Plan, which: str) -> Step:
    found = [s for s in planned.steps.values() if s.label == which or (len(which) >= 6 and s.key.startswith(which))]
    if len(found) != 1:
        labels = "\n".join(f"  {s.key[:12]}  {s.label}" for s in (found or planned.steps.values()))
        raise SpecError(f"{which}: {'more than one step' if found else 'no step'} of that name; the plan has\n{labels}")
    return found[0]
