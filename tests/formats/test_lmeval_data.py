"""Local data of a task's definition: what `datasets` reads is in the digest, wherever it lies."""

import os
from pathlib import Path

import pytest
import yaml

from portllm.errors import ResolveError
from portllm.formats import lmeval
from portllm.formats.lmeval_data import LOADERS, local_data
from portllm.formats.lmeval_index import definition_files
from tests.toys import write_parquet

LAYOUTS = {
    "a file": ("parquet", {"data_files": "{d}/a.parquet"}),
    "a list": ("parquet", {"data_files": ["{d}/a.parquet", "{d}/deep/b.parquet"]}),
    "by split": ("parquet", {"data_files": {"validation": "{d}/a.parquet", "train": ["{d}/deep/b.parquet"]}}),
    "a list of splits": ("parquet", {"data_files": [{"split": "validation", "path": "{d}/a.parquet"}]}),
    "a pattern": ("parquet", {"data_files": {"validation": "{d}/*.parquet"}}),
    "a deep pattern": ("parquet", {"data_files": {"validation": "{d}/**/*.parquet"}}),
    "a pattern of directories": ("parquet", {"data_files": {"validation": "{d}/*/b.parquet"}}),
    "a directory": ("parquet", {"data_dir": "{d}"}),
    "files of a directory": ("parquet", {"data_dir": "{d}", "data_files": "deep/b.parquet"}),
    "a pattern of a directory": ("parquet", {"data_dir": "{d}", "data_files": {"validation": "*.parquet"}}),
    "files of the working directory": ("parquet", {"data_files": "rows/a.parquet"}),
    "a directory as the data set": ("{d}", {}),
    "a directory of the working directory": ("rows", {}),
    "a part of a data set": ("{d}", {"data_dir": "deep"}),
    "files of a data set": ("{d}", {"data_files": {"validation": "deep/*.parquet"}}),
}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A directory of data below the working directory."""
    (tmp_path / "rows" / "deep").mkdir(parents=True)
    (tmp_path / "rows" / "__pycache__").mkdir()
    (tmp_path / "rows" / "__pycache__" / "a.parquet").write_bytes(b"")
    for i, name in enumerate(("a.parquet", "deep/b.parquet")):
        write_parquet(tmp_path / "rows" / name, [{"sentence": f"it was {i}", "label": i}])
    monkeypatch.chdir(tmp_path)
    return tmp_path / "rows"


def define(directory: Path, path: str, kwargs: dict, **more) -> Path:
    text = yaml.safe_dump({"task": "mine", "dataset_path": path, "dataset_kwargs": kwargs, **more})
    (directory.parent / "mine.yaml").write_text(text.replace("{d}", str(directory)))
    return directory.parent / "mine.yaml"


def read_by_datasets(file: Path) -> set[str]:
    from datasets import load_dataset_builder

    config = lmeval.merged_config(file)
    found = load_dataset_builder(config["dataset_path"], **config["dataset_kwargs"]).config.data_files
    return {os.path.realpath(part) for parts in found.values() for part in parts}


@pytest.mark.parametrize("path, kwargs", LAYOUTS.values(), ids=LAYOUTS)
def test_what_datasets_reads_is_what_the_digest_follows(rows, path, kwargs):
    file = define(rows, path, kwargs)
    read = read_by_datasets(file)
    assert read and read == {os.path.realpath(p) for p in local_data(lmeval.merged_config(file)) if p.is_file()}
    for part in read:
        before = lmeval.definition_digest(file)
        write_parquet(Path(part), [{"sentence": "it was other", "label": 5}])
        assert lmeval.definition_digest(file) != before


@pytest.mark.parametrize("name", ["a pattern", "a deep pattern", "a directory", "a directory as the data set"])
def test_a_file_added_later_counts_and_its_directory_is_among_what_is_looked_at(rows, name):
    file = define(rows, *LAYOUTS[name])
    before = lmeval.definition_digest(file)
    assert rows in set(definition_files(file))
    assert (rows / "deep" in set(definition_files(file))) == (name != "a pattern")
    write_parquet(rows / "c.parquet", [{"sentence": "it was more", "label": 1}])
    assert lmeval.definition_digest(file) != before


def test_the_card_of_a_directory_counts_even_where_files_are_named(rows):
    file = define(rows, *LAYOUTS["files of a data set"])
    before = lmeval.definition_digest(file)
    (rows / "README.md").write_text("---\nlicense: mit\n---\n")
    assert lmeval.definition_digest(file) != before


def test_data_beside_a_definition_that_says_them_in_an_include_count(rows):
    (rows.parent / "base").write_text(f"dataset_path: parquet\ndataset_kwargs: {{data_dir: {rows}}}\n")
    (rows.parent / "mine.yaml").write_text("include: base\ntask: mine\ndataset_kwargs: {data_files: rows/a.parquet}\n")
    assert [p for p in definition_files(rows.parent / "mine.yaml") if p.suffix == ".parquet"] == [rows / "a.parquet"]


def test_files_that_a_function_is_told_of_count(rows):
    (rows.parent / "made.py").write_text("def made(**_): pass\n")
    file = rows.parent / "mine.yaml"
    file.write_text(
        f"task: mine\ncustom_dataset: !function made.made\ndataset_kwargs: {{rows: {rows}, kind: a/b, between: /}}\n"
    )
    before = lmeval.definition_digest(file)
    write_parquet(rows / "deep" / "b.parquet", [{"sentence": "it was other", "label": 5}])
    assert lmeval.definition_digest(file) != before


@pytest.mark.parametrize(
    "path, kwargs",
    [
        ("owner/name", {}),
        ("name", {"data_files": {"test": "data/*.parquet"}, "data_dir": "nowhere"}),
        ("json", {"data_files": {"test": "hf://datasets/owner/name/rows.jsonl"}}),
        ("csv", {"data_files": ["https://example.org/rows.csv", "zip://*.csv::https://example.org/rows.zip"]}),
    ],
)
def test_what_lies_at_the_hub_or_behind_a_url_is_no_local_file(rows, path, kwargs):
    assert list(local_data({"task": "mine", "dataset_path": path, "dataset_kwargs": kwargs})) == []


@pytest.mark.parametrize(
    "path, kwargs, message",
    [
        ("parquet", {"data_files": "{d}/none.parquet"}, r"rows/none\.parquet does not exist"),
        ("parquet", {"data_files": "{d}/deep"}, r"rows/deep is not a file"),
        ("parquet", {"data_files": {"test": "{d}/*.csv"}}, r"rows/\*\.csv matches no file"),
        ("parquet", {"data_dir": "{d}/none"}, r"data_dir: .*rows/none is not a directory"),
        ("owner/name", {"data_files": "{d}/none.parquet"}, r"rows/none\.parquet does not exist"),
        ("csv", {"data_files": "zip://*.csv::{d}/none.zip"}, r"rows/none\.zip does not exist"),
        ("{d}/none", {}, r"dataset_path .*rows/none is not a directory"),
        ("./none", {}, r"dataset_path \./none is not a directory"),
        ("{d}/deep/b.parquet", {}, r"is not a directory: .*through a loader"),
        ("parquet", {}, "dataset_path `parquet` reads files and the definition names none: add .*data_root"),
    ],
)
def test_a_local_path_that_is_not_there_names_task_and_path(rows, path, kwargs, message):
    with pytest.raises(ResolveError, match=rf"^task `mine`: .*{message}"):
        lmeval.definition_digest(define(rows, path, kwargs))


def test_a_plain_file_has_the_digest_it_always_had(rows):
    import hashlib

    file = define(rows, *LAYOUTS["a file"])
    parts = {"mine.yaml": file, "rows/a.parquet": rows / "a.parquet"}
    lines = [f"{name}\0{hashlib.sha256(parts[name].read_bytes()).hexdigest()}\n" for name in sorted(parts)]
    assert lmeval.definition_digest(file) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_every_loader_that_datasets_ships_is_known():
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    assert set(_PACKAGED_DATASETS_MODULES) <= LOADERS
