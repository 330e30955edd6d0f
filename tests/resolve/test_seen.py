"""What a study stands on is looked at anew where it changed, and only there; keys follow content."""

import shutil

import pyarrow.parquet as pq
import pytest

from portllm.errors import SpecError
from portllm.resolve.resolver import open_study
from portllm.study.plan import make_plan
from tests.resolve.studies import keys, own_data, steps_of
from tests.toys import write_corpus, write_model, write_parquet


def test_a_key_follows_content_and_not_place(copy, tmp_path):
    before = keys(copy)
    shutil.move(copy.parent, tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "study.yaml"
    assert keys(moved) == before
    write_corpus(moved.parent / "corpus.txt", documents=201)
    assert keys(moved) != before


def test_a_second_look_reads_no_file_again(copy, monkeypatch):
    first = open_study(copy)
    monkeypatch.setattr("portllm.resolve.resolver.resolve", lambda *a: pytest.fail("resolved again"))
    assert open_study(copy) == first
    (copy.parent / "model" / "config.json").touch()
    with pytest.raises(pytest.fail.Exception):
        open_study(copy)


@pytest.mark.parametrize(
    ("field", "name"), [("models.m.path", "model"), ("data_root", "data"), ("corpora.c.path", "c.txt")]
)
def test_a_link_that_leads_elsewhere_is_seen(copy, field, name):
    root = copy.parent
    write_model(root / "2model", seed=5)
    shutil.copytree(root / "data", root / "2data")
    rows = pq.read_table(root / "data" / "mood" / "validation.parquet").to_pylist()
    write_parquet(root / "2data" / "mood" / "validation.parquet", rows[:-1])
    write_corpus(root / "c.txt", documents=60)
    write_corpus(root / "2c.txt", documents=70)
    (root / "link").symlink_to(name)
    asked = f"{field}=link"
    if name == "c.txt":
        (root / "link.txt").symlink_to(name)
        asked += ".txt"
    before = keys(copy, asked)
    assert keys(copy, asked) == before
    link = root / asked.partition("=")[2]
    link.unlink()
    link.symlink_to(f"2{name}")
    assert keys(copy, asked) != before


def test_a_changed_task_definition_is_seen_and_makes_new_keys(copy):
    before = keys(copy)
    definition = copy.parent / "tasks" / "mood.yaml"
    definition.write_text(definition.read_text().replace("positive or negative", "negative or positive"))
    assert keys(copy) != before


def test_training_data_added_later_are_seen(copy):
    train = copy.parent / "data" / "mood" / "train.parquet"
    saved = train.read_bytes()
    train.unlink()
    with pytest.raises(SpecError, match="no training documents"):
        keys(copy)
    train.write_bytes(saved)
    assert keys(copy)


def test_the_window_of_a_model_is_part_of_its_examples(copy):
    config = copy.parent / "model" / "config.json"
    before = make_plan(*open_study(copy)).steps
    config.write_text(config.read_text().replace('"max_position_embeddings": 64', '"max_position_embeddings": 48'))
    after = make_plan(*open_study(copy)).steps
    examples = [{k for k, s in steps.items() if s.label == "examples mood"} for steps in (before, after)]
    assert examples[0].isdisjoint(examples[1])


@pytest.mark.parametrize(
    "kwargs",
    [
        "{data_files: {train: '{d}/t*.parquet', validation: '{d}/v*.parquet'}}",
        "{data_dir: '{d}'}",
        "{data_dir: '{d}', data_files: {train: train.parquet, validation: validation.parquet}}",
    ],
)
def test_data_that_a_definition_names_are_seen_and_make_new_keys(copy, kwargs, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(copy.parent / "cache"))
    before = steps_of(own_data(copy, kwargs), "own")
    assert before and steps_of(copy, "own") == before
    file = copy.parent / "data" / "mood" / "validation.parquet"
    write_parquet(file, [row | {"label": 1 - row["label"]} for row in pq.read_table(file).to_pylist()])
    assert steps_of(copy, "own").isdisjoint(before)


def test_relative_data_of_a_definition_are_looked_for_anew_from_another_directory(copy, monkeypatch):
    own_data(copy, "{data_files: {train: data/mood/train.parquet, validation: data/mood/validation.parquet}}")
    monkeypatch.chdir(copy.parent)
    before = keys(copy)
    shutil.copytree(copy.parent / "data", copy.parent / "other" / "data")
    write_parquet(copy.parent / "other/data/mood/validation.parquet", [{"sentence": "it was good", "label": 1}])
    monkeypatch.chdir(copy.parent / "other")
    assert keys(copy) != before


def test_a_group_edited_in_place_is_seen_at_once(copy):
    file = copy.parent / "tasks" / "both.yaml"
    asked = ["tasks=[{task: both, include_path: tasks}]"]
    for members in ("[mood]", "[mood, tone]", "[tone]"):
        file.write_text(f"group: both\ntask: {members}\n")
        study, _ = open_study(copy, asked)
        assert f"[{', '.join(task.task for task in study.tasks)}]" == members


def test_a_tag_given_to_another_task_is_seen_at_once(copy):
    (copy.parent / "tasks" / "deep").mkdir()
    (copy.parent / "tasks" / "deep" / "base").write_text("output_type: multiple_choice\n")
    mood, tone = (copy.parent / "tasks" / f"{name}.yaml" for name in ("mood", "tone"))
    mood.write_text(mood.read_text() + "tag: moods\n")
    tone.write_text(tone.read_text() + "include: deep/base\n")
    asked = ["tasks=[{task: moods, include_path: tasks}]"]
    assert set(open_study(copy, asked)[1].tasks) == {"mood"}
    (copy.parent / "tasks" / "deep" / "base").write_text("output_type: multiple_choice\ntag: moods\n")
    assert set(open_study(copy, asked)[1].tasks) == {"mood", "tone"}


def test_a_definition_added_below_the_include_path_is_seen_at_once(copy):
    (copy.parent / "tasks" / "deep").mkdir()
    open_study(copy)
    other = (copy.parent / "tasks" / "mood.yaml").read_text().replace("positive or negative", "negative or positive")
    before = keys(copy)
    (copy.parent / "tasks" / "deep" / "mood.yaml").write_text(other)  # `deep/` comes before `mood.yaml`
    assert keys(copy) != before


def test_a_link_to_nowhere_among_the_definitions_is_no_error(copy):
    (copy.parent / "tasks" / ".#mood.yaml").symlink_to("nobody@nowhere")  # an editor's lock
    assert keys(copy)
