"""Every refusal that can be known before spending, and what is screened."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from portllm.errors import ResolveError, SpecError
from portllm.resolve.resolver import open_study
from portllm.study.plan import make_plan
from tests.resolve.studies import keys, own_data
from tests.toys import STUDY, write_corpus, write_model, write_parquet, write_patch


@pytest.mark.parametrize(
    "override, message",
    [
        ("models.m.path=nowhere", r"models\.m\.path: .*nowhere does not exist"),
        ("models.m={gguf: study.yaml}", "is not a GGUF file"),
        ("models.m={gguf: none.gguf}", r"models\.m\.gguf: .*does not exist.*make gemma"),
        ("corpora.c.path=none.txt", r"corpora\.c\.path: .*does not exist"),
        ("corpora.c={path: study.yaml, text: x}", "none of .parquet"),
        (
            "corpora.c={path: data/mood/train.parquet, text: sentense}",
            "no column `sentense`; its columns: sentence, label, idx",
        ),
        ("corpora.c={path: data/mood/train.parquet, template: '{sentence} {lable}'}", "no column `lable`"),
        ("corpora.c={path: data/mood/train.parquet, template: 'plain'}", "names no column"),
        ("corpora.c={generator: nope, documents: 3}", r"corpora\.c: .*nope"),
        ("tasks=[moood]", "lm-eval knows no task `moood`"),
        ("tasks=[{task: mood, include_path: nowhere}]", "include_path"),
        ("data_root=model", "has no directory `mood`"),
        ("patches={mood: model}", "patches"),
        ("patches={moood: patch}", r"patches\.moood: `moood` is not defined; did you mean `mood`"),
        ("finetune=null", "finetune: arms port, warm and refit train patches: give finetune"),
        ("lineages.soft.updates=[{path: data}]", r"lineages\.soft\.updates\[0\]\.path|weights"),
    ],
)
def test_what_a_study_names_must_exist_and_fit(world, override, message):
    with pytest.raises((ResolveError, SpecError), match=message):
        open_study(world, [override])


@pytest.mark.parametrize(
    "override, place",
    [
        ("models.m.path=nowhere", r"study\.yaml:4: models\.m\.path: "),
        ("corpora.c.path=none.txt", r"study\.yaml:5: corpora\.c\.path: "),
        ("tasks=[{task: mood, include_path: nowhere}]", r"study\.yaml:\d+: tasks\.mood\.include_path: "),
        ("lineages.soft.updates=[{path: data}]", r"study\.yaml:7: lineages\.soft\.updates\[0\]\.path: "),
    ],
)
def test_what_does_not_exist_is_named_with_file_and_line(world, override, place):
    with pytest.raises((ResolveError, SpecError), match=place):
        open_study(world, [override])


def test_a_label_outside_the_choices_is_told_in_either_file(copy):
    for split in ("validation", "train"):
        file = copy.parent / "data" / "mood" / f"{split}.parquet"
        kept = file.read_bytes()
        rows = [row | {"label": 2} for row in pq.read_table(file).to_pylist()]
        write_parquet(file, rows)
        with pytest.raises(ResolveError, match=rf"task `mood`: .*{split}\.parquet, document 0"):
            open_study(copy)
        file.write_bytes(kept)


def test_a_corpus_without_any_text_is_empty(copy):
    write_parquet(copy.parent / "null.parquet", [{"text": None, "n": 1}, {"text": "  ", "n": 2}])
    with pytest.raises(ResolveError, match="no document holds any text"):
        open_study(copy, ["corpora.c={path: null.parquet, text: text}"])


def test_an_empty_corpus_is_refused(copy):
    (copy.parent / "corpus.txt").write_text("\n \n")
    with pytest.raises(ResolveError, match="is empty"):
        open_study(copy)


def test_a_model_without_weights_is_refused(copy):
    (copy.parent / "model" / "model.safetensors").unlink()
    with pytest.raises(ResolveError, match="without weights"):
        open_study(copy)


@pytest.mark.parametrize("file", ["train", "validation"])
def test_a_label_outside_the_choices_names_task_and_file(copy, file):
    rows = [{"sentence": "it was good", "label": 1, "idx": 0}, {"sentence": "it was bad", "label": 2, "idx": 1}]
    write_parquet(copy.parent / "data" / "mood" / f"{file}.parquet", rows)
    with pytest.raises(ResolveError, match=rf"`mood`.*{file}\.parquet"):
        open_study(copy)


def test_a_missing_column_of_a_task_is_named(copy):
    write_parquet(copy.parent / "data" / "mood" / "validation.parquet", [{"text": "it was good", "label": 1}])
    with pytest.raises(ResolveError, match="`mood`.*sentence"):
        open_study(copy)


def test_dropout_of_a_model_is_found_where_it_is_stated(copy):
    config = copy.parent / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.1}))
    with pytest.raises(SpecError, match=r"model/config.json says `attention_dropout`: 0.1, .*: write 0 there"):
        keys(copy)
    assert keys(copy, "lineages={soft: {model: m}}", "arms=[none]")


def test_dropout_of_a_pretraining_is_found_in_the_study(copy):
    init = "models.m={init: {model_type: gpt2, corpus: c, tokens: 256, learning_rate: 1e-3, config: {%s}}}"
    with pytest.raises(SpecError, match=r"^models\.m\.init\.config\.attn_pdrop: 0.1, .*: write 0, or leave it out"):
        keys(copy, init % "attn_pdrop: 0.1")
    assert keys(copy, init % "attn_pdrop: 0.0")


def test_dropout_of_a_hub_model_is_known_by_its_shape(copy):
    (copy.parent / "shape.json").write_text('{"model_type": "phi", "resid_pdrop": 0.1}')
    with pytest.raises(SpecError, match=r"`resid_pdrop`: 0.1, .*: give the model as a directory \(`path`\)"):
        keys(copy, "models.m={hub: microsoft/phi-2, shape: shape.json}")


def test_dropout_of_a_patch_is_found_in_its_configuration(copy):
    write_patch(copy.parent / "patch", copy.parent / "model")
    config = copy.parent / "patch" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_dropout": 0.1}))
    assert keys(copy, "patches={mood: patch}", "arms=[none, port]")
    with pytest.raises(SpecError, match=r"patch/adapter_config.json says `lora_dropout`: 0.1"):
        keys(copy, "patches={mood: patch}", "arms=[none, port, warm]")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_dropout": "much"}))
    with pytest.raises(ResolveError, match="`lora_dropout` is 'much', no number"):
        keys(copy, "patches={mood: patch}")


@pytest.mark.parametrize("data", ["data_root: data\n", ""])
def test_generation_that_samples_or_leaves_no_room_is_refused_with_data_or_without(copy, data):
    copy.write_text(STUDY.replace("data_root: data\n", data))
    file = copy.parent / "tasks" / "mood.yaml"
    text = file.read_text().replace("multiple_choice", "generate_until").replace("parquet", "owner/" * (not data) + "x")
    file.write_text(text + "generation_kwargs: {until: ['.'], do_sample: true, temperature: 0.2}\n")
    with pytest.raises(ResolveError, match="task `mood`: generation_kwargs ask for do_sample: True, temperature: 0.2"):
        open_study(copy)
    file.write_text(text + "generation_kwargs: {until: ['.'], max_gen_toks: 64}\n")
    with pytest.raises(SpecError, match=r"task `mood`: .*64 new tokens \(max_gen_toks\), .* reads 64 in all"):
        make_plan(*open_study(copy))


def test_a_null_that_a_prompt_would_show_names_task_file_row_and_column(copy):
    file = copy.parent / "data" / "mood" / "train.parquet"
    rows = pq.read_table(file).to_pylist()
    write_parquet(file, [*rows, rows[0] | {"sentence": None}])
    with pytest.raises(ResolveError, match=rf"task `mood`: .*train\.parquet, document {len(rows)}: column `sentence`"):
        open_study(copy)


def test_a_patch_of_another_architecture_is_refused(copy):
    other = write_model(copy.parent / "other", hidden=16)
    write_patch(copy.parent / "patch", other)
    with pytest.raises(ResolveError, match=r"patches\.mood\[0\].*does not fit model `m`"):
        open_study(copy, ["patches={mood: patch}"])


def test_a_given_version_must_have_the_same_tensors(copy):
    write_model(copy.parent / "v1", layers=3)
    with pytest.raises(ResolveError, match="not a version of"):
        open_study(copy, ["lineages.soft.updates=[{path: v1}]"])


def test_shots_that_a_definition_does_not_take_are_said_and_not_claimed(copy):
    file = copy.parent / "tasks" / "mood.yaml"
    file.write_text(file.read_text() + "num_fewshot: 0\n")
    study, facts = open_study(copy, ["tasks=[{task: mood, include_path: tasks, num_fewshot: 3}]"])
    assert facts.notes == ("task mood: its definition says num_fewshot 0, and lm-eval keeps to that",)
    assert {cell.num_fewshot for cell in make_plan(study, facts).cells} == {0}


def test_a_planted_overlap_is_dropped_from_the_corpus_and_counted(copy):
    import pyarrow.parquet

    row = pyarrow.parquet.read_table(copy.parent / "data" / "mood" / "validation.parquet").to_pylist()[3]
    prompt = f"{row['sentence']}  question :  positive or negative ? answer : good"
    write_corpus(copy.parent / "corpus.txt", documents=50, extra=("it was nice", f"hello {prompt} bye"))
    _, facts = open_study(copy)
    assert facts.corpora["c"].excluded == (51,)
    assert facts.corpora["c"].most_tokens >= len((copy.parent / "corpus.txt").read_bytes())
    assert facts.notes == ("corpus c: 1 documents hold an evaluated prompt and are left out",)


def test_planning_imports_neither_torch_nor_ray(world, tmp_path):
    script = (
        f"import sys; from portllm.cli import main\n"
        f"try: main(['plan', {str(world)!r}, '--store', {str(tmp_path)!r}])\n"
        "finally: print(sorted({'torch', 'ray', 'transformers', 'mlflow', 'deepspeed'} & sys.modules.keys()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", "PORTLLM_CACHE": str(tmp_path / "cold")},
    )
    assert found.stdout.rstrip().endswith("[]"), found.stdout


def test_the_studies_that_ship_are_valid():

    from portllm.study.spec import load

    jobs = Path(__file__).parents[2] / "jobs"
    files = sorted(jobs.glob("*.yaml"))
    assert {f.stem for f in files} >= {"gemma", "paper", "sequential", "small_real"}
    for file in files:
        load(file.read_text(), str(file))
    assert STUDY


def test_a_version_with_another_tokenizer_is_refused(copy):
    write_model(copy.parent / "v1", seed=1)
    tokenizer = copy.parent / "v1" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"blue"', '"azure"'))
    with pytest.raises(ResolveError, match="tokenizer differs"):
        open_study(copy, ["lineages.soft.updates=[{path: v1}]"])


def test_a_patch_for_another_model_needs_finetune(copy):
    write_patch(copy.parent / "patch", copy.parent / "model")
    text = copy.read_text().replace(
        "finetune: {rank: 2, learning_rate: 1e-2, steps: 4, batch: 8}", "arms: [none, port]"
    )
    copy.write_text(text.replace("models: {m: {path: model}}", "models: {m: {path: model}, n: {path: model}}"))
    with pytest.raises(SpecError, match="give finetune"):
        keys(copy, "patches={mood: {path: patch, model: n}}")


@pytest.mark.parametrize(
    "override",
    [
        "name=2020-99-99",
        "corpora.c={path: latin.txt}",
        "corpora.c={path: list.jsonl, text: a}",
        "corpora.c={path: data/mood/train.parquet, template: '{sentence.foo}'}",
        "models.m.path=" + "x" * 5000,
        "finetune.learning_rate=true",
        "finetune.weight_decay=.inf",
        "finetune.rank=[]",
        "patches={mood: []}",
        "lineages.soft.updates[0].tokens=" + "9" * 400,
    ],
)
def test_hostile_values_are_one_clear_error(copy, override):
    (copy.parent / "latin.txt").write_bytes("caf\xe9 \n".encode("latin-1"))
    (copy.parent / "list.jsonl").write_text("[1]\n")
    with pytest.raises((SpecError, ResolveError)):
        keys(copy, override)


def test_data_that_a_definition_names_must_exist_unless_the_study_gives_others(copy):
    with pytest.raises(ResolveError, match=r"task `own`: its data .*none\.parquet does not exist"):
        open_study(own_data(copy, "{data_files: {validation: '{d}/none.parquet'}}"))
    (copy.parent / "data" / "own").symlink_to(copy.parent / "data" / "mood")
    assert open_study(copy, ["data_root=data"])[1].tasks["own"].documents


def test_a_task_at_the_hub_takes_no_screening_of_what_is_at_hand_away(copy):
    own_data(copy, "{data_dir: '{d}'}")
    row = pq.read_table(copy.parent / "data" / "mood" / "validation.parquet").to_pylist()[3]
    prompt = f"{row['sentence']} question : positive or negative ? answer :"
    write_corpus(copy.parent / "corpus.txt", documents=50, extra=(f"hello {prompt} bye",))
    copy.write_text(copy.read_text() + "corpora: {c: {path: corpus.txt}}\n")
    alone = open_study(copy)[1].corpora["c"]
    beside = open_study(copy, ["tasks=[{task: own, include_path: tasks}, arc_easy]"])[1].corpora["c"]
    assert alone.excluded == (50,) and alone.screened
    assert beside == replace(alone, screened=False)
