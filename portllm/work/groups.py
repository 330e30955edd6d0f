"""Scores of lm-eval's groups, joined from their tasks' as lm-eval joins them (`lm_eval.api.group`)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from portllm.formats import lmeval
from portllm.work.cells import Asked, Scored, Summed


def grouped(asked: Asked, found: Sequence[Scored]) -> Iterator[Summed]:
    """Patch by patch, the groups among `asked` that have a score of their own, where each of their tasks was scored."""
    groups = dict.fromkeys(group for name in asked.tasks for group in lmeval.members(name, asked.include).groups)
    for patch in dict.fromkeys(scored.patch for scored in found):
        cells = {scored.task: scored for scored in found if scored.patch == patch}
        for group in groups:
            if set(group.tasks) <= set(cells):
                inside = [cells[task] for task in group.tasks]
                yield Summed(patch, inside[0].rank, group.name, joined(group, [cell.summary for cell in inside]))


def joined(group: lmeval.Group, summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A group's summary from those of its tasks; a task without the metric is left out, as lm-eval does."""
    metrics: list[dict[str, Any]] = []
    for joining in group.joinings:
        there = {m["filter"] for summary in summaries for m in summary["metrics"] if m["metric"] == joining.metric}
        for name in joining.filters or sorted(there):
            if metric := _metric(summaries, joining.metric, name, joining.by_size):
                metrics.append({**metric, "primary": not metrics})
    shots = {summary["num_fewshot"] for summary in summaries}
    return {
        "metrics": metrics,
        "n": sum(summary["n"] for summary in summaries),
        "num_fewshot": shots.pop() if len(shots) == 1 else None,
        "score_s": sum(summary["score_s"] for summary in summaries),
    }


def _metric(summaries: Sequence[Mapping[str, Any]], metric: str, name: str, by_size: bool) -> dict[str, Any] | None:
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr, unweighted_mean_stderr

    inside = [
        (found, summary["n"])
        for summary in summaries
        for found in summary["metrics"]
        if (found["metric"], found["filter"]) == (metric, name)
    ]
    if not inside:
        return None
    about = {"metric": metric, "filter": name, "higher_is_better": inside[0][0]["higher_is_better"]}
    values, stderrs = ([found[column] for found, _ in inside] for column in ("value", "stderr"))
    if None in values:  # no number, and so is the mean
        return {**about, "value": None, "stderr": None}
    sizes = [n for _, n in inside]
    stderr = None
    if None not in stderrs:
        stderr = float(pooled_sample_stderr(stderrs, sizes) if by_size else unweighted_mean_stderr(stderrs))
    value = float(aggregate_subtask_metrics(values, sizes, by_size))
    return {**about, "value": value, "stderr": stderr}
