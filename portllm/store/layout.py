"""Every path of a store, in one object.

ROOT/
  artifacts/<stage>/<key>/    published: read-only, its existence means done; record.json beside the output
  attempts/<key>.<id>/        private to one execution; renamed to publish
  work/<key>/                 resumable training state
  failures/<key>/<n>.json     one per failed attempt
  logs/<key>.<id>.log         what a step printed
  studies/<name>/             the plan last run, the report
  scratch/                    materialised versions; a cache
  mlflow.db, mlflow/          default tracking
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StoreLayout:
    """Paths below one root."""

    root: Path

    def artifact(self, stage: str, key: str) -> Path:
        """Published output of a step."""
        return self.root / "artifacts" / stage / key

    def stage(self, stage: str) -> Path:
        """All published outputs of a stage."""
        return self.root / "artifacts" / stage

    def attempt(self, key: str, attempt: str) -> Path:
        """Private output of one execution."""
        return self.root / "attempts" / f"{key}.{attempt}"

    def work(self, key: str) -> Path:
        """Checkpoints of a training that is not published yet, the same for every attempt."""
        return self.root / "work" / key

    def watch(self, key: str) -> Path:
        """How far a running step is (`engine/watch.py`)."""
        return self.work(key) / "watch.jsonl"

    def stop(self, key: str) -> Path:
        """Is there while a running training is to keep its state and end."""
        return self.work(key) / "stop"

    def failures(self, key: str) -> Path:
        """Failure records of a step."""
        return self.root / "failures" / key

    def log(self, key: str, attempt: str) -> Path:
        """Log of one execution."""
        return self.root / "logs" / f"{key[:16]}.{attempt}.log"

    def study(self, name: str) -> Path:
        """What belongs to a study's name rather than to a key."""
        return self.root / "studies" / name

    @property
    def scratch(self) -> Path:
        """Cache of materialised versions."""
        return self.root / "scratch"
