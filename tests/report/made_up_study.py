"""A made-up study: two lineages, three versions, two tasks, two seeds. `full` loses the old patch, `lora` does not."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

N = 300
SKILL = {  # (lineage, arm) -> accuracy lost per version, on top of the task's own level
    ("lora", "port"): 0.0,
    ("full", "port"): 0.12,
}
LEVEL = {("easy", "none"): 0.48, ("easy", "patched"): 0.97, ("hard", "none"): 0.52, ("hard", "patched"): 0.80}


def digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def items_table(correct: np.ndarray, task: str, kind: str = "none") -> pa.Table:
    n = len(correct)
    return pa.table(
        {
            "doc_id": pa.array(range(n), pa.int64()),
            "doc_hash": [digest(task, i) for i in range(n)],
            "choice_loglikelihoods": pa.array([[-1.0, -2.0]] * n, pa.list_(pa.float64())),
            "prediction": ["0"] * n,
            "target": ["0"] * n,
            "correct": pa.array([None if np.isnan(c) else float(c) for c in correct], pa.float64()),
            "text": pa.array([None] * n, pa.string()),
            "filter": [kind] * n,
        }
    )


@dataclass
class MadeUp:
    """Rows, items and steps of a study that was never run."""

    study: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, pa.Table] = field(default_factory=dict)

    @property
    def items(self) -> Callable[[str], pa.Table]:
        return self.tables.__getitem__

    def cell(self, lineage: str, t: int, task: str, arm: str, seed: int | None, accuracy: float) -> None:
        """One cell: its items drawn, its row added. t = 0 has the same cells under every lineage."""
        version = digest("version", lineage if t else "", t)
        source_t = t if arm == "refit" else 0
        patches = [] if arm == "none" else [digest("patch", lineage if source_t else "", source_t, task, seed)]
        key = digest("cell", version, patches, task)
        if key not in self.tables:
            hardness = np.random.default_rng(int(digest(task)[:8], 16)).random(N)
            noise = np.random.default_rng(int(key[:8], 16)).random(N)
            correct = (np.where(noise < 0.7, hardness, noise / 0.3 - 7 / 3) < accuracy).astype(float)
            self.tables[key] = items_table(correct, task)
        values = np.array(self.tables[key]["correct"].to_pylist())
        self.rows.append(
            {
                "model": "tiny", "lineage": lineage, "t": t, "update": lineage if t else None,
                "update_seed": 0 if t else None,
                "task": task, "num_fewshot": None, "arm": arm, "source_model": None if arm == "none" else "tiny",
                "source_t": None if arm == "none" else source_t, "rank": None if arm == "none" else 8, "seed": seed,
                "patches": patches, "apply": "merged", "dtype": "float32", "metric": "acc", "filter": "none",
                "primary": True, "higher_is_better": True,
                "value": float(values.mean()), "stderr": float(values.std(ddof=1) / np.sqrt(N)), "n": N, "key": key,
                "version_key": version, "wall_s": 1.5,
            }
        )  # fmt: skip

    def training(self, stage: str, key: str, label: str, coordinates: dict[str, Any], tokens: int) -> None:
        rng = np.random.default_rng(int(key[:8], 16))
        losses = 0.3 + 2.5 * np.exp(-np.arange(60) / 15) + 0.05 * rng.standard_normal(60)
        curve = [
            {"step": i + 1, "loss": float(x), "learning_rate": 5e-3 * (1 - i / 60), "grad_norm": 1.0,
             "tokens_per_s": 5000.0} for i, x in enumerate(losses)
        ]  # fmt: skip
        summary = {
            "trainable_parameters": 812_544 if stage != "finetune" else 24_576, "total_parameters": 812_544,
            "tokens": tokens,
            "steps": 60, "loss_first": float(losses[0]), "loss_last": float(losses[-1]), "train_s": 9.0,
            "tokens_per_s": tokens / 9, "peak_rss_bytes": 612_000_000, "peak_device_bytes": None, "zero": 0, "world": 1,
        }  # fmt: skip
        step = {
            "stage": stage,
            "key": key,
            "label": label,
            "coordinates": coordinates,
            "wall_s": 10.5,
            "summary": summary,
        }
        self.steps.append(step | {"curve": curve, "devices": 1})


def make() -> MadeUp:
    study = {
        "name": "made-up", "models": {"tiny": {"init": "mistral", "layers": 2}}, "tasks": ["easy", "hard"],
        "fine-tuning": {"rank": 8, "seeds": [1, 2]},
        "lineages": {"lora": {"model": "tiny", "updates": [{"corpus": "near", "method": "lora", "tokens": 100_000}]},
                  "full": {"model": "tiny", "updates": [{"corpus": "far", "method": "full", "tokens": 100_000}]}},
        "arms": ["none", "port", "refit"], "store": "./portllm-store",
        "libraries": {"torch": "2.13.0", "peft": "0.21.0"},
        "created": "2026-01-02 03:04", "command": "portllm run made-up.yaml",
    }  # fmt: skip
    made = MadeUp(study)
    made.training("base", digest("base"), "base:tiny", {"model": "tiny"}, 300_000)
    for lineage in ("lora", "full"):
        for t in (0, 1, 2):
            if t:
                where = {"model": "tiny", "lineage": lineage, "t": t}
                made.training("update", digest("version", lineage, t), f"update:{lineage}/{t}", where, 100_000)
            for task in ("easy", "hard"):
                patched = LEVEL[task, "patched"]
                made.cell(lineage, t, task, "none", None, LEVEL[task, "none"])
                for seed in (1, 2):
                    made.cell(lineage, t, task, "port", seed, patched - t * SKILL[lineage, "port"])
                    made.cell(lineage, t, task, "refit", seed, patched)
                    key = made.rows[-1]["patches"][0]
                    if key not in {step["key"] for step in made.steps}:
                        where = {
                            "model": "tiny",
                            "lineage": lineage,
                            "t": t,
                            "task": task,
                            "rank": 8,
                            "seed": seed,
                            "arm": "refit",
                        }
                        made.training("finetune", key, f"finetune:{lineage}/{t}/{task}/s{seed}", where, 40_000)
    return made
