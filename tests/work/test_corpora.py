"""Stage `corpus`: documents from any origin, tokenised once, in a seeded order."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from portllm.errors import PortllmError, StageError
from portllm.formats import lmeval
from portllm.study.recipes import Base, Corpus, Text
from portllm.work import corpora
from portllm.work.base import train_tokenizer
from portllm.work.context import RunContext
from portllm.work.corpora import corpus
from portllm.work.versions import Versions

DOCUMENTS = ["the soup was lovely .", "", "a bed", "the cook was not tall .", "the bed was red ."]
PARQUET = Text(format="parquet", text="body", seed=4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(Base("init"), iter(DOCUMENTS)).save_pretrained(path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = {"title": ["A", "B", None, "D", "E"], "body": DOCUMENTS}
    pq.write_table(pa.table(rows), tmp_path / "source.parquet")
    return tmp_path / "source.parquet"


def make(out: Path, recipe: Corpus, **inputs: Path) -> dict[int, list[int]]:
    """Runs the stage; token ids by row number, in the published order."""
    out.mkdir(exist_ok=True)
    corpus(recipe, inputs, out, RunContext(out / "scratch", Versions(), log=lambda line: None))
    tokens, offsets, rows = (np.load(out / f"{name}.npy", mmap_mode="r") for name in ("tokens", "offsets", "rows"))
    assert (tokens.dtype, offsets.dtype, rows.dtype) == (np.uint32, np.int64, np.int64)
    return {int(row): tokens[offsets[i] : offsets[i + 1]].tolist() for i, row in enumerate(rows)}


def test_every_document_is_there_once_with_eos_after_it(tokenizer: Path, source: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    found = make(tmp_path / "out", Corpus(PARQUET), tokenizer=tokenizer, source=source)
    encode = AutoTokenizer.from_pretrained(tokenizer)
    for row, ids in found.items():
        assert ids[-1] == encode.eos_token_id
        assert encode.decode(ids[:-1]) == DOCUMENTS[row]
    assert sorted(found) == [0, 2, 3, 4]
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta == {"documents": 4, "tokens": sum(map(len, found.values())), "eos": encode.eos_token_id, "dropped": 0}


def test_a_document_begins_as_its_tokenizer_has_a_text_begin(tokenizer: Path, source: Path, tmp_path: Path) -> None:
    """BOS where the tokenizer puts it, and not twice where a document brings its own."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer)
    bos = words.bos_token_id
    words._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", words.eos_token_id)]
    )
    words.save_pretrained(tmp_path / "words")
    (tmp_path / "a.txt").write_text("the soup\n<s> a bed\n")
    plain = make(tmp_path / "plain", Corpus(Text("text")), tokenizer=tokenizer, source=tmp_path / "a.txt")
    found = make(tmp_path / "out", Corpus(Text("text")), tokenizer=tmp_path / "words", source=tmp_path / "a.txt")
    assert plain[1][0] == bos != plain[0][0]
    assert found == {0: [bos, *plain[0]], 1: plain[1]}


def test_the_order_is_the_seed_s(
    tokenizer: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def order(name: str, seed: int) -> list[int]:
        return list(make(tmp_path / name, Corpus(replace(PARQUET, seed=seed)), tokenizer=tokenizer, source=source))

    first = order("a", 4)
    assert any(order(f"seed{seed}", seed) != first for seed in range(3))
    monkeypatch.setattr(corpora, "DOCUMENTS", 2)
    monkeypatch.setattr(corpora, "COPIED", 3)
    assert order("b", 4) == first


def test_excluded_rows_and_screened_prompts_are_dropped_and_counted(
    tokenizer: Path, source: Path, tmp_path: Path
) -> None:
    screen = tmp_path / "screen"
    screen.mkdir()
    (screen / "prompts.json").write_text(json.dumps([lmeval.prompt_hash("the  bed was\nred .")]))
    inputs = {"tokenizer": tokenizer, "source": source, "screen1": screen}
    found = make(tmp_path / "out", Corpus(PARQUET, excluded=(0,)), **inputs)
    assert sorted(found) == [2, 3]
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["dropped"] == 2


def test_text_jsonl_template_and_generator_are_read(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the soup\n\na bed\n")
    assert sorted(make(tmp_path / "t", Corpus(Text("text")), tokenizer=tokenizer, source=tmp_path / "a.txt")) == [0, 2]
    (tmp_path / "a.jsonl").write_text('{"q": "the soup", "n": 3}\n{"q": null, "n": 4}\n')
    recipe = Corpus(Text("jsonl", template="{q} was {n}"))
    assert len(make(tmp_path / "j", recipe, tokenizer=tokenizer, source=tmp_path / "a.jsonl")) == 2
    (tmp_path / "b.jsonl").write_text('\ufeff{"text": "the soup"}\n\n{"text": "a bed"}\n\n', encoding="utf-8")
    found = make(tmp_path / "b", Corpus(Text("jsonl")), tokenizer=tokenizer, source=tmp_path / "b.jsonl")
    assert sorted(found) == [0, 2]  # a blank line is an empty document
    recipe = Corpus(Text(generator="reviews", documents=7, seed=1))
    assert sorted(make(tmp_path / "g", recipe, tokenizer=tokenizer)) == list(range(7))


def test_an_empty_corpus_is_refused(tokenizer: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="empty"):
        make(tmp_path / "out", Corpus(PARQUET, excluded=(0, 2, 3, 4)), tokenizer=tokenizer, source=source)


def test_a_missing_column_names_those_there_are(tokenizer: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(PortllmError, match="no column 'story'; its columns: title, body"):
        make(tmp_path / "out", Corpus(replace(PARQUET, text="story")), tokenizer=tokenizer, source=source)
