"""Commands on patches alone, without a study."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from portllm.errors import SpecError, StageError
from portllm.terminal import Json, print_json

if TYPE_CHECKING:
    from portllm.work.cells import At
    from portllm.work.source import Terms

app = typer.Typer()

PatchDirs = Annotated[
    list[Path], typer.Option("--patch", metavar="DIR", help="A PEFT adapter (repeatable: added in order).")
]
Scales = Annotated[list[float] | None, typer.Option("--scale", help="λ of each patch, in order; default 1.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
HubOrDir = Annotated[
    str, typer.Option("--model", metavar="DIR|HUB_ID", help="Model (safetensors): a directory, or owner/name@revision.")
]


@app.command()
def apply(
    model: HubOrDir,
    patch: PatchDirs,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory to write.")],
    scale: Scales = None,
    delta: Annotated[
        list[Path] | None,
        typer.Option("--delta", metavar="DIR", help="A LoRA update that makes the version of --model (repeatable)."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the model's.")] = None,
    untie: Annotated[bool, typer.Option("--untie", help="Give the head a tensor of its own first.")] = False,
    force: Force = False,
    durable: Annotated[bool, typer.Option("--durable", help="Flush to the disk before the output appears.")] = False,
    json: Json = False,
) -> None:
    """Write a model with patches added: θ + Σ λΔθ, to the bit what PEFT merges, at the speed of a copy."""
    from portllm.work.source import Terms

    terms = Terms(tuple(delta or ()), untie=untie)
    _apply(model, _paired(patch, scale or []), out, force, dtype, durable, terms, json)


@app.command()
def combine(
    patch: PatchDirs,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Patch to write; a model, with --model.")],
    scale: Annotated[
        list[float] | None, typer.Option("--scale", help="λ of each patch, in order; −1 subtracts; default 1.")
    ] = None,
    method: Annotated[
        Literal["linear", "ties", "dare", "dare-ties"], typer.Option(help="How the λΔθ become one.")
    ] = "linear",
    density: Annotated[float, typer.Option(help="ties, dare: share of each ΔW that stays.")] = 0.2,
    seed: Annotated[int, typer.Option(help="dare: of its draws.")] = 0,
    rank: Annotated[
        int | None, typer.Option(help="Cut the result to this rank; default: the sum of the patches' ranks.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="DIR|HUB_ID", help="Write this model with the result added.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="With --model: float32, bfloat16 or float16.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make one patch of several: sums and differences exactly, TIES and DARE, or cut to a rank with its error."""
    from portllm.report.patch_text import combine_text
    from portllm.work.changes import Blend

    patches = _paired(patch, scale or [])
    if method == "linear" and density != 0.2:
        raise SpecError("--density: of ties and dare: give --method, or leave it out")
    blend = None if method == "linear" else Blend(method, density, seed)
    if model is not None:
        from portllm.work.source import Terms

        if rank is not None:
            raise SpecError("--rank: of a patch; a model gets the whole result: leave out --rank or --model")
        _apply(model, patches, out, force, dtype, False, Terms(blend=blend), json)
        return
    if dtype is not None:
        raise SpecError("--dtype: of a model; patches are kept in float32: leave it out, or give --model")
    from portllm.work.combine import combine as combine_patches

    summary = combine_patches(patches, out, blend, rank, force) | {"out": str(out)}
    print_json([summary]) if json else print(combine_text(summary))


def _apply(
    model: str,
    patches: list[tuple[Path, float]],
    out: Path,
    force: bool,
    dtype: str | None,
    durable: bool,
    terms: Terms,
    json: bool,
) -> None:
    from portllm.work.apply import How, atomic_apply
    from portllm.work.hub import model_directory

    with _bytes_shown(quiet=json) as progress:
        how = How(len(os.sched_getaffinity(0)), durable, progress)
        summary = atomic_apply(model_directory(model), patches, out, force, dtype, how, terms)
    if json:
        print_json([summary | {"out": str(out)}])
    else:
        print(f"{out}: {summary['touched']} of {summary['tensors']} tensors patched, {summary['bytes'] / 1e9:.2f} GB")


PatchDir = Annotated[Path, typer.Argument(metavar="PATCH", help="A PEFT adapter directory.", show_default=False)]


@app.command()
def inspect(patch: PatchDir, json: Json = False) -> None:
    """Show what a patch is, in one screen."""
    from portllm.report.patch_text import inspect_text
    from portllm.work.diagnose import inspect as inspect_patch

    facts = inspect_patch(patch)
    print_json([facts]) if json else print(inspect_text(facts))


@app.command()
def check(
    model: Annotated[Path, typer.Option("--model", metavar="DIR", help="Model directory.")],
    patch: Annotated[Path, typer.Option("--patch", metavar="DIR", help="A PEFT adapter.")],
    json: Json = False,
) -> None:
    """Say whether a patch fits a model: names, shapes, values, tokenizer. Exit code 1 where it does not."""
    from portllm.report.patch_text import check_text
    from portllm.work.checking import check as check_patch

    verdict = check_patch(model, patch).to_json()
    print_json([verdict]) if json else print(check_text(verdict, str(patch), str(model)))
    if not verdict["fits"]:
        raise typer.Exit(1)


@app.command()
def diagnose(
    patch: PatchDir,
    model: Annotated[Path | None, typer.Option("--model", metavar="DIR", help="The version θₜ it goes onto.")] = None,
    base: Annotated[Path | None, typer.Option("--base", metavar="DIR", help="θ₀, to compare with the update.")] = None,
    other: Annotated[
        Path | None, typer.Option("--other", metavar="DIR", help="Another patch Δθ', for the residual.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the output, for what rounding loses; default: the model's.")
    ] = None,
    json: Json = False,
) -> None:
    """Say what a patch will do, without running anything: norms, ranks, what rounding loses, overlap, residuals."""
    from portllm.report.patch_text import diagnose_text
    from portllm.work.diagnose import diagnose as diagnose_patch

    if base is not None and model is None:
        raise SpecError("--base: the update from θ₀ needs the version θₜ as well: give --model")
    from portllm.work.source import Source

    if dtype is not None and (model is None or dtype not in ("float32", "bfloat16", "float16")):
        raise SpecError(f"--dtype: {dtype!r}: give float32, bfloat16 or float16, and --model")
    import torch

    version, zero = (Source.read(path, []) if path else None for path in (model, base))
    found = diagnose_patch(patch, version, zero, other, getattr(torch, dtype) if dtype else None)
    print_json([found]) if json else print(diagnose_text(found))


def _paired(directories: Sequence[Path], scales: Sequence[float]) -> list[tuple[Path, float]]:
    """Each patch with its λ. Raises SpecError for another number of λs, or one that is not finite."""
    if scales and len(scales) != len(directories):
        raise SpecError(f"--scale: {len(scales)} for {len(directories)} patches; give one to each, or none")
    if odd := [scale for scale in scales if not math.isfinite(scale)]:
        raise SpecError(f"--scale: {odd[0]} is no finite number")
    return list(zip(directories, scales or [1.0] * len(directories), strict=True))


@contextlib.contextmanager
def _bytes_shown(quiet: bool) -> Iterator[Callable[[int], None]]:
    """A line with what was written so far, on a terminal."""
    written = 0

    def show(count: int) -> None:
        nonlocal written
        written += count
        print(f"\r{written / 1e9:.2f} GB written", end="", file=sys.stderr, flush=True)

    on_terminal = not quiet and sys.stderr.isatty()
    try:
        yield show if on_terminal else lambda count: None
    finally:
        if on_terminal and written:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@app.command()
def evaluate(
    model: HubOrDir,
    tasks: Annotated[str, typer.Option("--tasks", metavar="A,B", help="lm-eval tasks, groups or tags.")],
    patch: Annotated[
        list[Path] | None, typer.Option("--patch", metavar="DIR", help="A PEFT adapter (repeatable: each by itself).")
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option("--data-root", metavar="DIR", help="DIR/TASK/validation.parquet, not the hub's data.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", metavar="DIR", help="Task definitions of your own.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Default: the task's own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First documents only.")] = None,
    mode: Annotated[
        Literal["merged", "adapter"], typer.Option("--apply", help="Patches merged, or kept apart.")
    ] = "merged",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the forward pass.")] = "float32",
    items: Annotated[Path | None, typer.Option(metavar="FILE", help="Every document's scores, as Parquet.")] = None,
    json: Json = False,
) -> None:
    """Score patches on tasks, the model loaded once: lm-eval's numbers, item by item. No study, no store."""
    from portllm.report.scores import score_notes, score_rows, score_text, write_items
    from portllm.work.cells import Asked, score
    from portllm.work.groups import grouped
    from portllm.work.hub import model_directory
    from portllm.work.publishing import replacing

    names = [name for name in (part.strip() for part in tasks.split(",")) if name]
    if not names:
        raise SpecError("--tasks: names no task")
    asked = Asked(names, data_root, include_path, num_fewshot, limit, mode, dtype, _device())
    found, failure = [], None
    with replacing(items) if items else contextlib.nullcontext() as table:
        with _cells_shown() as told:
            try:
                for scored in score(model_directory(model), patch or [], asked, told):
                    found.append(scored)
            except (StageError, KeyboardInterrupt) as error:
                if not found:
                    raise
                failure = error  # what was scored is not lost
        for line in score_notes(found, num_fewshot):
            print(line, file=sys.stderr)
        rows = score_rows(model, mode, dtype, [*found, *grouped(asked, found)])
        print_json(rows) if json else print(score_text(rows))
        if items and table:
            write_items(found, table, items)
    if failure is not None:
        raise failure


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _cells_shown() -> Iterator[Callable[[At], None]]:
    """The cell that is being scored, a bar of its requests and the time they take yet, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda at: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task("preparing", total=None)

        def show(at: At) -> None:
            nonlocal row
            if at.total is not None:
                bar.update(row, completed=at.done, total=at.total)
                return
            bar.remove_task(row)
            patch = f", {at.patch.name}" if at.patch else ""
            row = bar.add_task(f"[{at.cell}/{at.cells}] {at.task}{patch}", total=None)

        yield show
