"""Requests and training examples: lm-eval's token ids, made once; no evaluated document among the examples."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from portllm.errors import StageError
from portllm.formats import lmeval
from portllm.study.recipes import Requests
from portllm.work.context import RunContext
from portllm.work.requests import open_examples, open_requests, order, requests
from portllm.work.tokenizing import Encoder, load_tokenizer
from portllm.work.versions import Versions
from tests.toys import write_model, write_parquet, write_tasks

LM_EVAL = "0.4.13"
ANSWERS = {"generates": "output_type: generate_until\ndoc_to_text: sentence\ndoc_to_target: '{{label}}'\n"
                        "generation_kwargs: {until: ['question'], max_gen_toks: 8}\n",
           "rolls": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: sentence\n"}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = write_tasks(tmp_path_factory.mktemp("world"), ("mood", "tone"))
    write_model(root / "model")
    for name, text in ANSWERS.items():
        (root / "tasks" / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: parquet\ntraining_split: train\nvalidation_split: validation\n{text}"
        )
    return root


@pytest.fixture
def run(tmp_path):
    return RunContext(scratch=tmp_path / "scratch", versions=Versions(), log=lambda line: None)


def inputs(world: Path, task: str, data: Path | None = None) -> dict[str, Path]:
    return {"tokenizer": world / "model", "definition": world / "tasks", "data": data or world / "data" / task}


def made(run, out: Path, given: dict[str, Path], task: str, split: str = "evaluate", **settings):
    """(artifact directory, summary) of the stage."""
    summary = requests(Requests(task=task, split=split, lm_eval=LM_EVAL, **settings), given, out, run)
    return out, summary


def hflm(model: Path, **options):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=8, **options)


def encoded_by_hflm(lm, pairs: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """What HFLM hands to its scorer: ids of context and continuation, and where the continuation begins."""
    from types import SimpleNamespace

    seen = []
    lm._loglikelihood_tokens = lambda requests, **_: seen.extend(requests)
    lm.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    return [(context + continuation, len(context)) for _, context, continuation in seen]


# ------------------------------------------------------------------------------------------------------------ evaluate


def test_an_artifact_holds_every_request_with_its_document(world, run, tmp_path):
    path, summary = made(run, tmp_path / "r", inputs(world, "mood"), "mood")
    found = open_requests(path)
    task = lmeval.build(lmeval.TaskSource("mood", world / "tasks", world / "data" / "mood"))
    docs = lmeval.documents(task)
    assert summary["requests"] == len(found) == 2 * len(docs) == 40
    assert found.documents.tolist() == [i // 2 for i in range(40)] and found.choices.tolist() == [0, 1] * 20
    assert found.doc_ids.tolist() == list(range(20))
    assert [h.decode() for h in found.doc_hashes] == [lmeval.doc_hash(doc) for doc in docs]
    hashes = {lmeval.prompt_hash(prompt) for prompt in lmeval.folded_prompts(task)}
    assert json.loads((path / "prompts.json").read_text()) == sorted(hashes)
    assert isinstance(found.tokens, np.memmap) and found.tokens.dtype == np.uint32
    words = load_tokenizer(world / "model").decode(found.ids(3)[found.answers[3] :])
    assert words == "good"


def test_limit_takes_the_first_documents(world, run, tmp_path):
    path, summary = made(run, tmp_path / "r", inputs(world, "mood"), "mood", limit=3)
    assert summary["documents"] == 3 and open_requests(path).documents.tolist() == [0, 0, 1, 1, 2, 2]


def test_the_same_recipe_makes_the_same_bytes(world, run, tmp_path):
    paths = [made(run, tmp_path / n, inputs(world, "mood"), "mood", num_fewshot=2)[0] for n in "ab"]
    for file in paths[0].iterdir():
        assert file.read_bytes() == (paths[1] / file.name).read_bytes()


def test_a_text_that_is_scored_whole_follows_the_token_before_it(world, run, tmp_path):
    path, _ = made(run, tmp_path / "r", inputs(world, "rolls", world / "data" / "mood"), "rolls")
    found = open_requests(path)
    tokenizer = load_tokenizer(world / "model")
    assert set(found.answers) == {1}
    assert {int(found.ids(request)[0]) for request in range(len(found))} == {tokenizer.bos_token_id}
    task = lmeval.build(lmeval.TaskSource("rolls", world / "tasks", world / "data" / "mood"))
    text = lmeval.documents(task)[0]["sentence"]
    assert found.ids(0)[1:].tolist() == tokenizer(text)["input_ids"]


PAIRS = [("it was", " good"), ("it was ", "good"), ("it was  \n", " a film"), ("", "good film"), ("", "<s> good"),
         ("<s> it was", " good"), (" ", "good")]  # fmt: skip


@pytest.mark.parametrize("add_bos", [None, False, True])
@pytest.mark.parametrize("name", ["toy", "stories260K", "home-12M"])
def test_tokens_are_hflms(request, world, name, add_bos):
    model = world / "model" if name == "toy" else request.getfixturevalue("shared_data") / "models" / name
    lm = hflm(model, add_bos_token=add_bos)
    encoder = Encoder(load_tokenizer(model, add_bos), add_bos)
    pairs = PAIRS if name != "toy" else PAIRS[:-1]  # a context without any token: HFLM refuses it, too
    assert encoder.pairs(pairs) == encoded_by_hflm(lm, pairs)
    contexts = [context for context, _ in pairs if context.strip()]
    assert encoder.contexts(contexts) == [lm.tok_batch_encode([c])[0][0].tolist() for c in contexts]


def test_a_choice_without_a_token_is_refused(world, run, tmp_path):
    (tmp_path / "t.yaml").write_text((world / "tasks" / "mood.yaml").read_text().replace("- bad", "- ' '"))
    with pytest.raises(StageError, match="document 0: choice 0 has no token of its own"):
        made(run, tmp_path / "r", inputs(world, "mood") | {"definition": tmp_path}, "mood")


def test_a_directory_without_a_tokenizer_is_refused(world, run, tmp_path):
    with pytest.raises(StageError, match="no tokenizer can be read from"):
        made(run, tmp_path / "r", inputs(world, "mood") | {"tokenizer": tmp_path}, "mood")


# --------------------------------------------------------------------------------------------------------------- train


def test_examples_are_the_gold_requests_of_the_training_rows(world, run, tmp_path):
    path, summary = made(run, tmp_path / "t", inputs(world, "mood"), "mood", "train")
    found = open_examples(path)
    assert summary["examples"] == summary["available"] == len(found) == 48
    task = lmeval.build(lmeval.TaskSource("mood", world / "tasks", world / "data" / "mood"))
    by_id = {pair.doc_id: pair for pair in lmeval.training_pairs(task)}
    encoder = Encoder(load_tokenizer(world / "model"))
    for n in range(48):
        ids, answer = encoder.pairs([by_id[int(found.doc_ids[n])][2:]])[0]
        assert found.tokens[found.offsets[n] : found.offsets[n + 1]].tolist() == ids and found.answers[n] == answer


def test_fewer_examples_are_the_first_of_the_same_order(world, run, tmp_path):
    some = open_examples(made(run, tmp_path / "some", inputs(world, "mood"), "mood", "train", examples=10)[0])
    every = open_examples(made(run, tmp_path / "all", inputs(world, "mood"), "mood", "train")[0])
    assert some.doc_ids.tolist() == every.doc_ids[:10].tolist() == order(48)[:10] != list(range(10))


def test_one_more_row_moves_no_other_pair_of_rows():
    assert [i for i in order(101) if i < 100] == order(100) and sorted(order(100)) == list(range(100))


def test_generated_answers_learn_to_end_and_choices_do_not(world, run, tmp_path):
    given = inputs(world, "generates", world / "data" / "mood")
    generated = open_examples(made(run, tmp_path / "g", given, "generates", "train", examples=3)[0])
    chosen = open_examples(made(run, tmp_path / "c", inputs(world, "mood"), "mood", "train", examples=3)[0])
    eos = load_tokenizer(world / "model").eos_token_id
    assert [generated.tokens[end - 1] for end in generated.offsets[1:]] == [eos] * 3
    assert eos not in chosen.tokens


def planted(world: Path, where: Path, train_extra: list[dict]) -> Path:
    """The data of `mood` with rows added to its training file."""
    import pyarrow.parquet as pq

    where.mkdir()
    shutil.copy(world / "data" / "mood" / "validation.parquet", where)
    rows = pq.read_table(world / "data" / "mood" / "train.parquet").to_pylist()
    write_parquet(where / "train.parquet", rows + train_extra)
    return where


def test_an_evaluated_document_planted_among_the_training_rows_is_dropped_and_counted(world, run, tmp_path):
    import pyarrow.parquet as pq

    victims = pq.read_table(world / "data" / "mood" / "validation.parquet").to_pylist()[5:8]
    # Another label, another number, other blanks: still the same document.
    leaks = [{"sentence": f"{v['sentence']}  ", "label": 1 - v["label"], "idx": 1000} for v in victims]
    data = planted(world, tmp_path / "data", leaks)
    path, summary = made(run, tmp_path / "t", inputs(world, "mood", data), "mood", "train")
    assert (summary["available"], summary["examples"], summary["dropped_leaks"]) == (51, 48, 3)
    assert max(open_examples(path).doc_ids) < 48


def test_documents_of_another_task_that_asks_alike_are_screened_by_its_requests(world, run, tmp_path):
    import pyarrow.parquet as pq

    other = pq.read_table(world / "data" / "tone" / "validation.parquet").to_pylist()[:2]
    data = planted(world, tmp_path / "data", other)
    screen = made(run, tmp_path / "screen", inputs(world, "mood", world / "data" / "tone"), "mood")[0]
    given = inputs(world, "mood", data) | {"screen1": screen}
    assert made(run, tmp_path / "with", given, "mood", "train")[1]["dropped_leaks"] == 2
    assert made(run, tmp_path / "without", inputs(world, "mood", data), "mood", "train")[1]["dropped_leaks"] == 0


def test_rows_longer_than_the_window_are_dropped_counted_and_replaced(world, run, tmp_path):
    long = [{"sentence": "good " * 80, "label": 1, "idx": n} for n in range(20)]
    data = planted(world, tmp_path / "data", long)
    path, summary = made(run, tmp_path / "t", inputs(world, "mood", data), "mood", "train", examples=40)
    assert summary["examples"] == 40 and summary["dropped_long"] > 0 and max(open_examples(path).doc_ids) < 48
    data = planted(world, tmp_path / "only", [])
    write_parquet(data / "train.parquet", long)
    with pytest.raises(StageError, match=r"of 20 training documents none is left: .*'dropped_long': 20"):
        made(run, tmp_path / "none", inputs(world, "mood", data), "mood", "train")
