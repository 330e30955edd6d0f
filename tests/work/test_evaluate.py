"""One cell: patches applied, scored, graded by lm-eval; the same numbers as lm-eval's own evaluation."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file, save_file

from portllm.errors import ResolveError, StageError
from portllm.formats import lmeval
from portllm.study.recipes import Evaluate, Requests
from portllm.work.context import RunContext
from portllm.work.evaluate import SCHEMA, evaluate
from portllm.work.requests import requests
from portllm.work.versions import Versions
from tests.toys import write_model, write_parquet, write_patch, write_tasks

pytestmark = pytest.mark.usefixtures("one_thread")

LM_EVAL = "0.4.13"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One process's surroundings: models stay resident between tests."""
    return RunContext(scratch=tmp_path_factory.mktemp("scratch"), versions=Versions(), log=lambda line: None)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = write_tasks(tmp_path_factory.mktemp("world"), ("mood",))
    write_model(root / "model")
    write_patch(root / "patch", root / "model")
    return root


def toy(world: Path) -> dict[str, Path]:
    return {"definition": world / "tasks", "data": world / "data" / "mood"}


def cell(run, out: Path, model: Path, task: str, given: dict[str, Path], patches: tuple[Path, ...] = (), limit=None,
         num_fewshot=None, **settings) -> dict[str, Any]:  # fmt: skip
    """Requests and evaluation below `out`; returns the evaluation's summary."""
    recipe = Requests(task=task, split="evaluate", lm_eval=LM_EVAL, limit=limit, num_fewshot=num_fewshot)
    if not (out / "requests").is_dir():
        requests(recipe, {"tokenizer": model, **given}, out / "requests", run)
    inputs = {"root": model, "requests": out / "requests", **given}
    inputs |= {f"patch{i}": path for i, path in enumerate(patches, 1)}
    settings.setdefault("scales", (1.0,) * len(patches))
    summary = evaluate(Evaluate(lm_eval=LM_EVAL, **settings), inputs, out / "cell", run)
    assert json.loads(json.dumps(summary)) == summary, "a record is JSON"
    return summary


def items(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "cell" / "items.parquet").to_pylist()


def lm_evals_own(model: Path, source: lmeval.TaskSource, limit: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(results, samples) of `lm_eval.evaluate` with its HFLM."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=8)
    found = lm_eval.evaluate(lm, {source.name: lmeval.build(source)}, limit=limit, log_samples=True, bootstrap_iters=2)
    return found["results"][source.name], found["samples"][source.name]


# -------------------------------------------------------------------------------------------------------------- parity


def assert_parity(run, out: Path, model: Path, source: lmeval.TaskSource, given: dict[str, Path], limit: int) -> None:
    summary = cell(run, out, model, source.name, given, limit=limit, num_fewshot=source.num_fewshot)
    results, samples = lm_evals_own(model, source, limit)
    for metric in summary["metrics"]:
        key = f"{metric['metric']}{{}},{metric['filter']}"
        assert metric["value"] == pytest.approx(results[key.format("")], abs=1e-9)
        if metric["metric"] in ("acc", "exact_match"):  # closed forms; lm-eval bootstraps the others
            assert metric["stderr"] == pytest.approx(results[key.format("_stderr")], abs=1e-9)
    ours = items(out)
    assert [(i["doc_id"], i["doc_hash"], i["filter"]) for i in ours] == [
        (s["doc_id"], s["doc_hash"], s["filter"]) for s in samples
    ]
    for item, sample in zip(ours, samples, strict=True):
        if item["text"] is not None:
            assert (item["text"], item["prediction"]) == (sample["resps"][0][0], sample["filtered_resps"][0])
            assert item["correct"] == sample["exact_match"]
            continue
        theirs = np.array([response[0][0] for response in sample["resps"]])
        np.testing.assert_allclose(item["choice_loglikelihoods"], theirs, atol=1e-4, rtol=0)
        best = np.sort(theirs)[-2:]
        assert int(item["prediction"]) == int(theirs.argmax()) or best[1] - best[0] < 2e-4
        assert item["correct"] == sample["acc"]


CASES = [("sst2", 100, None), ("sst2", 12, 3), ("rte", 100, None), ("mrpc", 40, None), ("winogrande", 100, None),
         ("boolq", 24, None), ("gsm8k", 6, None), ("gsm8k", 6, 0)]  # fmt: skip


@pytest.mark.parametrize(("task", "limit", "shots"), CASES)
def test_real_tasks_score_as_lm_eval_scores_them(shared_data, run, tmp_path, task, limit, shots):
    """stories260K; boolq's and gsm8k's prompts are longer than its window of 512 tokens."""
    given = {"data": shared_data / "tasks" / task}
    source = lmeval.TaskSource(task, data=given["data"], num_fewshot=shots)
    assert_parity(run, tmp_path, shared_data / "models" / "stories260K", source, given, limit)


def test_a_toy_task_scores_as_lm_eval_scores_it(world, run, tmp_path):
    source = lmeval.TaskSource("mood", world / "tasks", world / "data" / "mood")
    assert_parity(run, tmp_path, world / "model", source, toy(world), 20)


def test_log_likelihood_tasks_score_as_lm_eval_scores_them(world, run, tmp_path):
    (tmp_path / "say.yaml").write_text(
        "task: say\ndataset_path: parquet\noutput_type: loglikelihood\nvalidation_split: validation\n"
        "doc_to_text: sentence\ndoc_to_target: ' question :'\n"
        "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false},"
        " {metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    given = toy(world) | {"definition": tmp_path}
    summary = cell(run, tmp_path, world / "model", "say", given, limit=8)
    results, samples = lm_evals_own(world / "model", lmeval.TaskSource("say", tmp_path, given["data"]), 8)
    values = {m["metric"]: m for m in summary["metrics"]}
    assert values["perplexity"]["value"] == pytest.approx(results["perplexity,none"], rel=1e-5)
    assert not values["perplexity"]["higher_is_better"]
    assert values["acc"]["primary"] and values["acc"]["higher_is_better"]
    assert values["acc"]["value"] == results["acc,none"]
    scores = [item["choice_loglikelihoods"][0] for item in items(tmp_path)]
    np.testing.assert_allclose(scores, [s["resps"][0][0][0] for s in samples], atol=1e-4)
    by_the_delta_method = values["perplexity"]["value"] * np.std(scores) / 8**0.5
    assert values["perplexity"]["stderr"] == pytest.approx(by_the_delta_method, rel=0.2)  # bootstrapped, 200 draws


def test_perplexities_are_those_of_lm_eval(world, run, tmp_path):
    (tmp_path / "rolls.yaml").write_text(
        "task: rolls\ndataset_path: parquet\noutput_type: loglikelihood_rolling\nvalidation_split: validation\n"
        "doc_to_text: ''\ndoc_to_target: sentence\n"
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n"
    )
    given = toy(world) | {"definition": tmp_path}
    summary = cell(run, tmp_path, world / "model", "rolls", given, limit=8)
    results, samples = lm_evals_own(world / "model", lmeval.TaskSource("rolls", tmp_path, given["data"]), 8)
    for metric in summary["metrics"]:
        assert metric["value"] == pytest.approx(results[f"{metric['metric']},none"], rel=1e-5)
    scores = [item["choice_loglikelihoods"][0] for item in items(tmp_path)]
    np.testing.assert_allclose(scores, [s["resps"][0][0] for s in samples], atol=1e-4)


def test_a_perplexity_beyond_any_float_is_no_number(world, run, tmp_path):
    wild = shutil.copytree(world / "model", tmp_path / "wild")
    tensors = load_file(wild / "model.safetensors")
    save_file({name: tensor * 1e4 for name, tensor in tensors.items()}, wild / "model.safetensors", {"format": "pt"})
    (tmp_path / "rolls.yaml").write_text(
        "task: rolls\ndataset_path: parquet\noutput_type: loglikelihood_rolling\nvalidation_split: validation\n"
        "doc_to_text: ''\ndoc_to_target: sentence\nmetric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n"
    )
    summary = cell(run, tmp_path, wild, "rolls", toy(world) | {"definition": tmp_path}, limit=4)
    assert [metric["value"] is None for metric in summary["metrics"]] == [True, False]


CLASS = """
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask


class Likely(ConfigurableTask):
    VERSION, DATASET_PATH, DATASET_NAME = 1, "parquet", None

    def __init__(self, config=None):
        data = {{"data_files": {{"validation": "{rows}"}}}}
        super().__init__(config={{"metadata": {{"version": 1}}, "dataset_kwargs": data}})

    def has_training_docs(self): return False
    def has_validation_docs(self): return True
    def has_test_docs(self): return False
    def validation_docs(self): return self.dataset["validation"]
    def doc_to_text(self, doc): return doc["sentence"]
    def doc_to_target(self, doc): return [" bad", " good"][doc["label"]]
    def ask(self, kind, doc, arguments, idx=0, **named):
        named = {{k: v for k, v in named.items() if "chat_template" not in k}}
        return Instance(request_type=kind, doc=doc, arguments=arguments, idx=idx, **named)
    def construct_requests(self, doc, ctx, **named):
        return [self.ask("loglikelihood", doc, (ctx, c), i, **named) for i, c in enumerate([" bad", " good"])]
    def process_results(self, doc, results):
        return {{"acc": float(np.argmax([score for score, _ in results]) == doc["label"])}}
    def aggregation(self): return {{"acc": np.mean}}
    def higher_is_better(self): return {{"acc": True}}


class Says(Likely):
    def construct_requests(self, doc, ctx, **named):
        return [self.ask("generate_until", doc, (ctx, {{"until": ["film"], "max_gen_toks": 6}}), **named)]
    def process_results(self, doc, results): return {{"acc": float(len(results[0]))}}


class Both(Likely):
    def construct_requests(self, doc, ctx, **named):
        return Likely.construct_requests(self, doc, ctx, **named) + Says.construct_requests(self, doc, ctx, **named)
"""


def class_task(world: Path, folder: Path, name: str) -> lmeval.TaskSource:
    """A task that is a Python class and makes its requests itself, as lm-eval's `swde` does."""
    (folder / "task.py").write_text(CLASS.format(rows=world / "data" / "mood" / "validation.parquet"))
    (folder / "own.yaml").write_text(f"task: own\nclass: !function task.{name}\n")
    return lmeval.TaskSource("own", folder)


@pytest.mark.parametrize("name", ["Likely", "Says"])
def test_a_task_that_is_a_class_scores_as_lm_eval_scores_it(world, run, tmp_path, name):
    source = class_task(world, tmp_path, name)
    facts = lmeval.check(source)
    assert (facts.documents, facts.choices, facts.new_tokens) == (20, *((2, 0) if name == "Likely" else (1, 6)))
    summary = cell(run, tmp_path, world / "model", "own", {"definition": tmp_path}, limit=8)
    results, samples = lm_evals_own(world / "model", source, 8)
    assert summary["metrics"][0]["value"] == pytest.approx(results["acc,none"])
    for item, sample in zip(items(tmp_path), samples, strict=True):
        if name == "Says":
            assert item["text"] == sample["resps"][0][0]
        else:
            theirs = [response[0][0] for response in sample["resps"]]
            np.testing.assert_allclose(item["choice_loglikelihoods"], theirs, atol=1e-4)


def test_a_task_that_asks_for_texts_and_likelihoods_at_once_is_refused(world, tmp_path):
    with pytest.raises(ResolveError, match="`own` asks for generate_until and loglikelihood at once"):
        lmeval.check(class_task(world, tmp_path, "Both"))


# ------------------------------------------------------------------------------------------------------------- results


def test_results_and_items_are_written_as_announced(world, run, tmp_path):
    summary = cell(run, tmp_path, world / "model", "mood", toy(world))
    results = json.loads((tmp_path / "cell" / "results.json").read_text())
    assert results == {key: summary[key] for key in ("metrics", "n", "num_fewshot")}
    assert [(m["metric"], m["filter"], m["primary"]) for m in results["metrics"]] == [("acc", "none", True)]
    assert results["n"] == 20 and results["num_fewshot"] == 0
    assert summary["truncated"] == 0 and summary["score_s"] > 0 and summary["items_per_s"] > 0
    assert pq.read_schema(tmp_path / "cell" / "items.parquet").equals(SCHEMA)
    rows = items(tmp_path)
    assert np.mean([row["correct"] for row in rows]) == results["metrics"][0]["value"]
    assert all((row["prediction"] == row["target"]) == bool(row["correct"]) for row in rows)


def test_items_are_graded_by_the_metric_that_a_task_names_itself(world, run, tmp_path):
    definition = (world / "tasks" / "mood.yaml").read_text() + "process_results: !function own_results.graded\n"
    (tmp_path / "mood.yaml").write_text(definition)
    (tmp_path / "own_results.py").write_text(
        "def graded(doc, results):\n"
        "    best = max(range(2), key=lambda n: results[n][0])\n"
        "    return {'hit': float(best == doc['label'])}\n"
    )
    found = cell(run, tmp_path, world / "model", "mood", toy(world) | {"definition": tmp_path})["metrics"]
    assert [(metric["metric"], metric["primary"]) for metric in found] == [("hit", True)]
    assert np.mean([row["correct"] for row in items(tmp_path)]) == pytest.approx(found[0]["value"])


@pytest.mark.parametrize(
    ("metric", "choices"),
    [
        ("acc_norm", ["bad", "very good indeed"]),
        ("acc_bytes", ["bad", "very good indeed"]),
        ("acc_mutual_info", ["good", "bad"]),
    ],
)
def test_a_prediction_is_the_choice_that_the_primary_metric_takes(world, run, tmp_path, metric, choices):
    config = yaml.safe_load((world / "tasks" / "mood.yaml").read_text())
    config |= {"metric_list": [{"metric": metric}], "doc_to_choice": choices}
    (tmp_path / "mood.yaml").write_text(yaml.safe_dump(config))
    cell(run, tmp_path, world / "model", "mood", toy(world) | {"definition": tmp_path})
    rows = items(tmp_path)
    assert all((row["prediction"] == row["target"]) == bool(row["correct"]) for row in rows)
    likeliest = [str(np.argmax(row["choice_loglikelihoods"][:2])) for row in rows]
    assert likeliest != [row["prediction"] for row in rows]


def test_a_single_document_has_no_standard_error(world, run, tmp_path):
    metric = cell(run, tmp_path, world / "model", "mood", toy(world), limit=1)["metrics"][0]
    assert metric["value"] in (0.0, 1.0) and metric["stderr"] is None


def test_f1_has_a_value_and_a_bootstrapped_standard_error(world, run, tmp_path):
    config = yaml.safe_load((world / "tasks" / "mood.yaml").read_text())
    config["metric_list"].append({"metric": "f1", "aggregation": "f1", "higher_is_better": True})
    (tmp_path / "mood.yaml").write_text(yaml.safe_dump(config))
    found = cell(run, tmp_path, world / "model", "mood", toy(world) | {"definition": tmp_path})["metrics"]
    assert [(m["metric"], m["primary"]) for m in found] == [("acc", True), ("f1", False)]
    assert 0.5 < found[1]["stderr"] / found[0]["stderr"] < 2 and found[1]["value"] is not None


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_a_patch_moves_the_scores_and_leaves_the_version_as_it_was(world, run, tmp_path, mode):
    scores = []
    for patches in ((), (world / "patch",), ()):
        cell(run, tmp_path, world / "model", "mood", toy(world), patches, apply=mode)
        scores.append([row["choice_loglikelihoods"] for row in items(tmp_path)])
    assert scores[0] == scores[2] != scores[1]


def test_both_modes_and_a_scale_of_zero_agree(world, run, tmp_path):
    def scored(**settings):
        cell(run, tmp_path, world / "model", "mood", toy(world), (world / "patch",), **settings)
        return np.array([row["choice_loglikelihoods"] for row in items(tmp_path)])

    np.testing.assert_allclose(scored(apply="merged"), scored(apply="adapter"), atol=1e-4)
    nothing = scored(scales=(0.0,))
    cell(run, tmp_path, world / "model", "mood", toy(world))
    assert nothing.tolist() == [row["choice_loglikelihoods"] for row in items(tmp_path)]


def test_a_cell_in_bf16_is_close(world, run, tmp_path):
    found = {}
    for dtype in ("float32", "bfloat16"):
        cell(run, tmp_path, world / "model", "mood", toy(world), dtype=dtype)
        found[dtype] = np.array([row["choice_loglikelihoods"] for row in items(tmp_path)])
    np.testing.assert_allclose(found["bfloat16"], found["float32"], atol=0.1)
    assert (found["bfloat16"] != found["float32"]).any()


def test_as_many_scales_as_patches_are_needed(world, run, tmp_path):
    with pytest.raises(StageError, match="1 patches and 0 scales"):
        cell(run, tmp_path, world / "model", "mood", toy(world), (world / "patch",), scales=())


def test_data_that_changed_since_the_requests_were_made_are_refused(world, run, tmp_path):
    given = toy(world) | {"data": tmp_path / "data"}
    given["data"].mkdir()
    rows = [{"sentence": "it was good", "label": 1, "idx": 0}, {"sentence": "it was bad", "label": 0, "idx": 1}]
    write_parquet(given["data"] / "validation.parquet", rows)
    write_parquet(given["data"] / "train.parquet", rows)
    recipe = Requests(task="mood", split="evaluate", lm_eval=LM_EVAL)
    requests(recipe, {"tokenizer": world / "model", **given}, tmp_path / "requests", run)
    write_parquet(given["data"] / "validation.parquet", rows[::-1])
    with pytest.raises(StageError, match="its documents are not those that"):
        cell(run, tmp_path, world / "model", "mood", given)
