"""One step in this process, without Ray."""

from __future__ import annotations

import sys

from portllm.engine.execute import Outcome, execute, job_for
from portllm.engine.preemption import listen
from portllm.engine.progress import one_line
from portllm.engine.workers import new_context, prepare
from portllm.errors import EngineError
from portllm.store.store import Store
from portllm.study.steps import Plan, Step


def run_step(step: Step, plan: Plan, store: Store) -> Outcome:
    """Execute a step whose inputs are published."""
    for role, key in step.inputs.items():
        if key in plan.steps and not store.has(plan.steps[key].stage, key):
            raise EngineError(f"{step.label} needs `{plan.steps[key].label}` ({role}), which is not published yet")
    if step.layout.workers > 1:
        raise EngineError(
            f"{step.label} runs on {step.layout.workers} workers: use `portllm run`, or "
            f"-o resources.{step.stage}.workers=1"
        )
    context = new_context(store.paths.scratch, step.layout.threads, step.layout.gpus)
    job = job_for(step, plan, store)
    prepare(context, job)
    if sys.stderr.isatty():
        context.progress = one_line(step.label)
    listen()
    return execute(job, context)
