"""Stage `evaluate`: one cell. Patches applied to a resident version, a task's requests scored, lm-eval's own grading.

    items.parquet   one row per document and filter (columns in `SCHEMA`)
    results.json    {"metrics": [{metric, filter, primary, higher_is_better, value, stderr}], "n", "num_fewshot"}

The primary metric is the first of the task's list of which more is better, else the first, under the filter
`strict-match` where the task has one, else its first.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from portllm.errors import StageError
from portllm.formats import lmeval
from portllm.study.recipes import Evaluate, Requests
from portllm.work.context import Progress, RunContext, Summary
from portllm.work.generating import generate
from portllm.work.requests import RequestSet, open_requests, source
from portllm.work.scoring import loglikelihoods
from portllm.work.versions import numbered

SCHEMA = pa.schema(
    [
        ("doc_id", pa.int64()),
        ("doc_hash", pa.string()),
        ("choice_loglikelihoods", pa.list_(pa.float64())),  # null for generated text
        ("prediction", pa.string()),  # the choice the primary metric takes; for generated text what the filter found
        ("target", pa.string()),  # the right choice's number; for generated text the answer
        ("correct", pa.float64()),  # the primary metric of this document; null where it is not a number
        ("text", pa.string()),  # generated text, before any filter
        ("filter", pa.string()),
    ]
)

_DRAWS = 200
"""Of the bootstrap where no closed form is known, which knows a standard error to 5 %. lm-eval draws 100,000 times:
minutes for F1 over 408 documents."""
_DRAWN = (
    "median", "perplexity", "weighted_perplexity", "bits_per_byte", "f1_score", "matthews_corrcoef", "brier_score",
)  # fmt: skip
"""The aggregations for which it is done, by their functions in lm-eval; BLEU, chrF and TER take seconds each."""


@dataclass(frozen=True)
class Graded:
    """A cell's numbers."""

    metrics: list[dict[str, Any]]
    items: list[dict[str, Any]]


def evaluate(recipe: Evaluate, inputs: Mapping[str, Path], out: Path, run: RunContext) -> Summary:
    """Score and grade one cell below `out`; the resident version is left as it was."""
    patches = numbered(inputs, "patch")
    if len(patches) != len(recipe.scales):
        raise StageError(f"the cell has {len(patches)} patches and {len(recipe.scales)} scales")
    requests = open_requests(inputs["requests"])
    task, documents = _task(inputs, requests)
    resident = run.open(inputs, recipe.dtype)
    with resident.applied(list(zip(patches, recipe.scales, strict=True)), mode=recipe.apply):
        started = run.clock()
        responses, noted = respond(resident, requests, recipe.score_tokens, run.progress)
        score_s = run.clock() - started
    graded = grade(task, documents, requests, responses)
    results = {"metrics": graded.metrics, "n": len(documents), "num_fewshot": requests.meta["num_fewshot"]}
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(graded.items, schema=SCHEMA), out / "items.parquet", compression="zstd")
    (out / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False), encoding="utf-8")
    run.log(" ".join(f"{m['metric']},{m['filter']}={m['value']}" for m in graded.metrics))
    speed = len(documents) / score_s if score_s > 0 else None
    return {**results, **noted, "score_s": score_s, "items_per_s": speed}


def respond(resident: Any, requests: RequestSet, budget: int, progress: Progress) -> tuple[list[Any], dict[str, int]]:
    """lm-eval's response to each request, (log-likelihood, is greedy), log-likelihood or text; and what was noted.

    Noted are requests that were truncated, and batches that were halved for want of memory. `progress` hears how many
    requests are done, of how many.
    """
    kind = requests.meta["output_type"]
    if kind == "generate_until":
        made = generate(resident.model, resident.tokenizer, requests, budget, progress)
        return made.texts, {"truncated": made.truncated, "halved": made.halved}
    scores = loglikelihoods(resident.model, requests, budget, progress)
    noted = {"truncated": scores.truncated, "halved": scores.halved}
    likely = scores.loglikelihoods.tolist()
    return likely if kind == "loglikelihood_rolling" else list(zip(likely, scores.greedy.tolist(), strict=True)), noted


_tasks: dict[Path, tuple[Any, list[dict[str, Any]]]] = {}
"""Tasks of this process by their requests, which are published and never change."""


def _task(inputs: Mapping[str, Path], requests: RequestSet) -> tuple[Any, list[dict[str, Any]]]:
    """The task that made the requests, and their documents."""
    path = inputs["requests"]
    if path not in _tasks:
        recipe = Requests(**requests.meta["recipe"])
        task = lmeval.build(source(recipe, inputs))
        documents = lmeval.documents(task, recipe.limit)
        if [lmeval.doc_hash(doc) for doc in documents] != [h.decode() for h in requests.doc_hashes]:
            raise StageError(f"task `{recipe.task}`: its documents are not those that {path} was made from")
        while len(_tasks) >= 16:
            _tasks.pop(next(iter(_tasks)))
        _tasks[path] = task, documents
    return _tasks[path]


def grade(task: Any, documents: Sequence[dict[str, Any]], requests: RequestSet, responses: Sequence[Any]) -> Graded:
    """lm-eval's filters, per-document results and aggregation over responses, as its evaluator runs them."""
    instances = _answered(task, documents, requests, responses)
    task._instances = [instance for group in instances for instance in group]
    task.apply_filters()
    values: dict[tuple[str, str], list[Any]] = defaultdict(list)
    results: dict[str, list[dict[str, Any]]] = {}
    for filter_name in task._instances[0].filtered_resps:
        results[filter_name] = [
            task.process_results(doc, [instance.filtered_resps[filter_name] for instance in group])
            for doc, group in zip(documents, instances, strict=True)
        ]
        for found in results[filter_name]:
            for metric, value in found.items():
                values[metric, filter_name].append(value)
    task._instances = None
    if not values:
        raise StageError(f"task `{task.config.task}` yields none of its metrics: {', '.join(task.aggregation())}")
    primary = lmeval.primary(task)
    if primary not in values:  # a task with its own process_results names its metrics itself
        primary = next(iter(values))
    items = []
    for filter_name, each in results.items():
        for position, (doc, group, found) in enumerate(zip(documents, instances, each, strict=True)):
            about = {"doc_id": int(requests.doc_ids[position]), "doc_hash": requests.doc_hashes[position].decode()}
            correct = _number(found.get(primary[0]))
            item = _item(task, doc, group, filter_name, primary[0])
            items.append({**about, **item, "correct": correct, "filter": filter_name})
    return Graded([_metric(task, key, found, key == primary) for key, found in values.items()], items)


def _answered(
    task: Any, documents: Sequence[dict[str, Any]], requests: RequestSet, responses: Sequence[Any]
) -> list[list[Any]]:
    """lm-eval's instances with their responses, by document."""
    from lm_eval.api.instance import Instance

    kind = requests.meta["output_type"]
    groups: list[list[Any]] = [[] for _ in documents]
    for request, response in enumerate(responses):
        position = int(requests.documents[request])
        about = (task.config.task, int(requests.doc_ids[position]), task.config.repeats)
        instance = Instance(kind, documents[position], (), int(requests.choices[request]), about)
        instance.resps = [response] * (task.config.repeats or 1)  # greedy: every repeat is the same
        groups[position].append(instance)
    return groups


def _item(task: Any, doc: dict[str, Any], group: Sequence[Any], filter_name: str, metric: str) -> dict[str, Any]:
    answer = group[0].filtered_resps[filter_name]
    if task.OUTPUT_TYPE == "multiple_choice":
        scores = [float(instance.resps[0][0]) for instance in group]
        gold = ",".join(map(str, lmeval.gold_choices(task, doc)))
        taken = _taken(metric, np.array(scores), task.doc_to_choice(doc))
        return {"choice_loglikelihoods": scores, "prediction": str(taken), "target": gold}
    if group[0].request_type == "loglikelihood_rolling":
        return {"choice_loglikelihoods": [float(answer)]}
    if group[0].request_type == "loglikelihood":
        scores = [float(instance.resps[0][0]) for instance in group]
        alone = {"prediction": str(bool(answer[1])), "target": "True"} if len(group) == 1 else {}
        return {"choice_loglikelihoods": scores, **alone}
    return {"prediction": str(answer), "target": str(task.doc_to_target(doc)), "text": str(group[0].resps[0])}


def _taken(metric: str, scores: np.ndarray, choices: Sequence[str]) -> int:
    """The choice that a metric of lm-eval's takes: by likelihood, a character's or byte's share of it, or what it gains
    over no question at all (`ConfigurableTask.process_results`)."""
    likely = scores[: len(choices)]
    if metric == "acc_norm":
        likely = likely / [float(len(choice)) for choice in choices]
    elif metric == "acc_bytes":
        likely = likely / [float(len(choice.encode())) for choice in choices]
    elif metric == "acc_mutual_info":
        likely = likely - scores[len(choices) :]
    return int(np.argmax(likely))


def _metric(task: Any, key: tuple[str, str], values: list[Any], primary: bool) -> dict[str, Any]:
    from lm_eval.api import metrics

    aggregate = task.aggregation().get(key[0], metrics.mean)
    return {
        "metric": key[0],
        "filter": key[1],
        "primary": primary,
        "higher_is_better": lmeval.higher_is_better(task, key[0]),
        "value": _aggregated(aggregate, values),
        "stderr": _stderr(aggregate, values),
    }


def _stderr(aggregate: Callable[[list[Any]], Any], values: list[Any]) -> float | None:
    """lm-eval's standard error in its closed forms; bootstrapped for others."""
    from lm_eval.api import metrics

    if len(values) < 2:
        return None
    if aggregate in (metrics.mean, metrics.acc_all):
        return _number(metrics.stderr_for_metric(aggregate, 1)(values))
    if aggregate not in [getattr(metrics, name) for name in _DRAWN]:
        return None
    rng, n = np.random.default_rng(0), len(values)
    draws = [_aggregated(aggregate, [values[i] for i in rng.integers(n, size=n)]) for _ in range(_DRAWS)]
    known = [draw for draw in draws if draw is not None]
    return float(np.std(known, ddof=1)) if len(known) == _DRAWS else None


def _aggregated(aggregate: Callable[[list[Any]], Any], values: list[Any]) -> float | None:
    try:
        return _number(aggregate(values))
    except OverflowError:  # a diverged model's perplexity is more than a float holds
        return None


def _number(value: Any) -> float | None:
    """A finite float; null for anything else."""
    if isinstance(value, bool | int | float | np.bool_ | np.number) and math.isfinite(float(value)):
        return float(value)
    return None
