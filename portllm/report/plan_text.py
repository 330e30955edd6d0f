"""A plan and its status in words and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from portllm.store.store import Store
from portllm.study.estimate import (
    CPU_FLOPS,
    DOCUMENT_TOKENS,
    GPU_FLOPS,
    by_stage,
    total,
)
from portllm.study.facts import Facts
from portllm.study.steps import Cost, Plan, Step

STAGES = ("base", "corpus", "requests", "update", "finetune", "evaluate", "diagnose", "export")
"""Order of display."""


def plan_text(plan: Plan, facts: Facts, published: set[str], store: str) -> str:
    """Stages, cells, what exists, what the rest costs."""
    costs = by_stage(plan, frozenset(published))
    lines = [f"{plan.name}: {len(plan.steps)} steps, {len(plan.cells)} cells, store {store}", ""]
    lines.append(
        f"{'stage':<10}{'steps':>7}{'published':>11}{'to run':>8}{'device-hours':>14}{'memory':>10}{'disk':>10}"
        f"  per worker"
    )
    for stage in STAGES:
        steps = [s for s in plan.steps.values() if s.stage == stage]
        if steps:
            lines.append(_stage_line(stage, steps, published, costs.get(stage, Cost())))
    whole = total(costs)
    done = len(published & plan.steps.keys())
    lines.append(
        f"{'total':<10}{len(plan.steps):>7}{done:>11}{len(plan.steps) - done:>8}{_hours(whole):>14}"
        f"{_bytes(whole.memory):>10}{_bytes(whole.disk):>10}"
    )
    lines += [
        "",
        f"Estimates count {CPU_FLOPS:.0e} FLOP/s a CPU thread, {GPU_FLOPS:.1e} a GPU, {DOCUMENT_TOKENS} tokens a "
        "document; memory is that of one worker with its activations.",
    ]
    unknown = sorted(name for name, model in facts.models.items() if model.shape is None)
    if unknown:
        lines.append(f"Shape unknown before a run, so not in the estimate: {', '.join(unknown)}.")
    lines += [f"note: {note}" for note in plan.notes]
    if plan.unpinned:
        lines += [
            "",
            f"Not pinned to a commit, so this plan has no keys and will not run: {', '.join(plan.unpinned)}.",
            "`portllm lock STUDY` pins them.",
        ]
    return "\n".join(lines)


def _stage_line(stage: str, steps: list[Step], published: set[str], price: Cost) -> str:
    done = sum(s.key in published for s in steps)
    return (
        f"{stage:<10}{len(steps):>7}{done:>11}{len(steps) - done:>8}{_hours(price):>14}{_bytes(price.memory):>10}"
        f"{_bytes(price.disk):>10}  {_layouts(steps)}"
    )


def _layouts(steps: list[Step]) -> str:
    """Workers x CPUs (and GPUs) of a stage."""
    shown = Counter((s.layout.workers, s.layout.threads, s.layout.gpus) for s in steps)
    return ", ".join(f"{w} x {c} CPU{f' {g} GPU' if g else ''}" for w, c, g in shown)


def _hours(price: Cost) -> str:
    return f"{price.device_s / 3600:,.2f}"


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count else "-"
        count = round(count / 1000)
    return f"{count:,} TB"


def plan_json(plan: Plan, published: set[str]) -> dict[str, Any]:
    """The whole plan as JSON values; keys are null while something is unpinned."""
    keyed = not plan.unpinned
    return {
        "name": plan.name,
        "unpinned": list(plan.unpinned),
        "notes": list(plan.notes),
        "steps": [_step_json(s, published, keyed) for s in plan.steps.values()],
        "cells": [
            vars(cell) | ({} if keyed else {"key": None, "version_key": None, "patches": []}) for cell in plan.cells
        ],
    }


def _step_json(step: Step, published: set[str], keyed: bool) -> dict[str, Any]:
    return {
        "key": step.key if keyed else None,
        "stage": step.stage,
        "label": step.label,
        "inputs": dict(step.inputs) if keyed else sorted(step.inputs),
        "published": step.key in published,
        "resources": vars(step.layout),
        "device_s": round(step.cost.device_s, 2),
        "memory_bytes": step.cost.memory,
        "disk_bytes": step.cost.disk,
    }


# --- status


def status_text(plan: Plan, published: set[str], failed: Mapping[str, Mapping[str, Any]]) -> str:
    """Counts by stage, then every failure with its log."""
    lines = [f"{plan.name}: {len(published & plan.steps.keys())} of {len(plan.steps)} steps published"]
    for stage in STAGES:
        steps = [s for s in plan.steps.values() if s.stage == stage]
        if steps:
            done, bad = sum(s.key in published for s in steps), sum(s.key in failed for s in steps)
            lines.append(f"  {stage:<10}{done:>6}/{len(steps)}{f'  {bad} failed last time' if bad else ''}")
    for key, failure in failed.items():
        lines.append(f"{plan.steps[key].label}: {failure['type']}: {failure['message']}\n  log: {failure['log']}")
    return "\n".join(lines)


def status_json(plan: Plan, published: set[str], failed: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per step; a failed one with its error and log."""
    return [
        {
            "key": s.key,
            "stage": s.stage,
            "label": s.label,
            "status": "published" if s.key in published else "failed" if s.key in failed else "missing",
            **({name: failed[s.key][name] for name in ("type", "message", "log")} if s.key in failed else {}),
        }
        for s in plan.steps.values()
    ]


def differences(step: Step, store: Store) -> dict[str, list[str]]:
    """Published steps of the same label under other keys, and the fields in which they differ."""
    found = {}
    for key in store.published([step.stage]) - {step.key}:
        record = store.record(step.stage, key)
        if record["label"] == step.label:
            found[key] = sorted(_differing(step.payload(), record["payload"], ""))
    return found


def _differing(ours: Any, theirs: Any, at: str) -> list[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = ours.keys() | theirs.keys()
        return [line for n in names for line in _differing(ours.get(n), theirs.get(n), f"{at}.{n}".lstrip("."))]
    return [] if ours == theirs else [f"{at}: {ours} here, {theirs} there"]
