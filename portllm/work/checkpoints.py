"""Resumable state of a training: written beside its work, without stopping it, and read by any number of ranks.

    DIR/step-000120-of-2/rank0.safetensors   masters and moments of every second parameter, whole
    DIR/step-000120-of-2/rank1.safetensors   those of the others

A checkpoint is complete when the file of each of its ranks is there; a file appears by a rename after it was flushed.
The newest complete one that can be read is resumed from, and the two newest are kept while another is written.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, distributed

from portllm.errors import StageError
from portllm.work import engine_state
from portllm.work.context import RunContext

KEPT = 2
PATIENCE = 20
"""A checkpoint waits at least so many times as long as the last one held the training up: 5 % at most."""


@dataclass
class Checkpoints:
    """One rank's side of a training's checkpoints."""

    directory: Path
    run: RunContext
    saved_at: float = field(init=False)
    held_up: float = 0.0
    """Seconds that the last checkpoint held the training up."""
    writer: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.saved_at = self.run.clock()

    @property
    def due(self) -> bool:
        """Whether it is time for another; never while one is being written."""
        wait = max(self.run.layout.checkpoint_s, PATIENCE * self.held_up)
        return (self.writer is None or not self.writer.is_alive()) and self.run.clock() - self.saved_at >= wait

    def save(self, engine: Any, step: int, facts: Mapping[str, Any]) -> None:
        """Copies the state and writes it in the background. Collective."""
        begun = self.run.clock()
        self.finish()
        names = list(engine_state.moving(engine.module))
        tensors = engine_state.read(engine, frozenset(names[self.run.rank :: self.run.world]))
        about = {"step": step, "numbers": engine_state.numbers(engine), **facts}
        target = self.directory / f"step-{step:06}-of-{self.run.world}" / f"rank{self.run.rank}.safetensors"
        self.writer = threading.Thread(target=self._write, args=(target, tensors, about))
        self.writer.start()
        self.saved_at = self.run.clock()
        self.held_up = self.saved_at - begun

    def finish(self) -> None:
        """Waits for what is being written."""
        if self.writer is not None:
            self.writer.join()

    def _write(self, target: Path, tensors: dict[str, Tensor], about: Mapping[str, Any]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        partial = target.with_suffix(".partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, {"about": json.dumps(about)})
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.rename(target)
            if self.run.rank == 0:
                for old in complete(self.directory)[:-KEPT]:
                    shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:  # a full disk: the training does not need it
            partial.unlink(missing_ok=True)
            self.run.log(f"no checkpoint of optimizer step {about['step']}: {error}")

    def restore(self, engine: Any) -> dict[str, Any] | None:
        """Puts the newest complete checkpoint into a fresh engine; returns what was said of it. Collective."""
        newest = self._agreed(self._newest() if self.run.rank == 0 else None)
        if newest is None:
            return None
        tensors, about = _open(self.directory / newest)
        engine_state.write(engine, tensors, about["numbers"])
        return about

    def _newest(self) -> str | None:
        """The newest checkpoint that can be read; raises StageError where there are some, and none can."""
        errors = []
        for path in reversed(complete(self.directory)):
            try:
                _open(path)
            except StageError as error:
                errors.append(error)
                self.run.log(str(error))
            else:
                self._set_aside([other for other in complete(self.directory) if _numbers(other) > _numbers(path)])
                return path.name
        if errors:
            raise errors[0]
        return None

    def _set_aside(self, unreadable: list[Path]) -> None:
        """Out of the way: they count as the newest, and the newest are kept."""
        for path in unreadable:
            path.rename(path.with_name(f"unreadable-{path.name}"))

    def _agreed(self, name: str | None) -> str | None:
        """Rank 0's choice: another rank may see the directory earlier or later."""
        if self.run.world == 1:
            return name
        choice = [name]
        distributed.broadcast_object_list(choice, src=0)
        return choice[0]


def complete(directory: Path) -> list[Path]:
    """Complete checkpoints, the newest last."""
    return sorted(filter(_is_complete, directory.glob("step-*-of-*")), key=_numbers)


def _numbers(path: Path) -> tuple[int, int]:
    """(step, ranks) of a checkpoint."""
    _, step, _, world = path.name.split("-")
    return int(step), int(world)


def _is_complete(path: Path) -> bool:
    _, world = _numbers(path)
    return all((path / f"rank{rank}.safetensors").is_file() for rank in range(world))


def _open(path: Path) -> tuple[Callable[[str], Tensor], dict[str, Any]]:
    """(tensor by name, what was said of them) of a complete checkpoint; a tensor is read when it is asked for."""
    from safetensors import SafetensorError, safe_open

    try:
        files = [safe_open(file, framework="pt") for file in sorted(path.glob("*.safetensors"))]
    except (OSError, SafetensorError) as error:
        raise StageError(f"{path}: no checkpoint to go on from ({error}): remove it and run again") from error
    owner = {name: file for file in files for name in list(file.keys())}
    about: dict[str, Any] = json.loads(files[0].metadata()["about"])
    return lambda name: owner[name].get_tensor(name), about
