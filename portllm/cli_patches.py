"""Commands on patches alone, without a study."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from portllm.errors import SpecError
from portllm.terminal import Json, print_json

app = typer.Typer()

PatchDirs = Annotated[
    list[Path], typer.Option("--patch", metavar="DIR", help="A PEFT adapter (repeatable: added in order).")
]


@app.command()
def apply(
    model: Annotated[Path, typer.Option("--model", metavar="DIR", help="Model directory (safetensors).")],
    patch: PatchDirs,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory to write.")],
    scale: Annotated[list[float] | None, typer.Option("--scale", help="λ of each patch; default 1.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the model's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    durable: Annotated[bool, typer.Option("--durable", help="Flush to the disk before the output appears.")] = False,
    json: Json = False,
) -> None:
    """Write a model with patches added: θ + Σ λΔθ, to the bit what PEFT merges, at the speed of a copy."""
    from portllm.work.apply import How, atomic_apply

    patches = _paired(patch, scale or [])
    with _bytes_shown(quiet=json) as progress:
        how = How(len(os.sched_getaffinity(0)), durable, progress)
        summary = atomic_apply(model, patches, out, force, dtype, how)
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
    json: Json = False,
) -> None:
    """Say what a patch will do, without running anything: norms, ranks, what rounding loses, overlap, residuals."""
    from portllm.report.patch_text import diagnose_text
    from portllm.work.diagnose import diagnose as diagnose_patch

    if base is not None and model is None:
        raise SpecError("--base: the update from θ₀ needs the version θₜ as well: give --model")
    found = diagnose_patch(patch, model, base, other)
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
