"""`portllm evaluate`: several patches in one load of the model, lm-eval's numbers, no study and no store."""

import io
import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.cli import main
from portllm.store.results import COLUMNS
from portllm.work.cells import Asked, At, score
from tests.toys import write_model, write_patch, write_tasks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = write_tasks(tmp_path_factory.mktemp("world"))
    write_model(root / "model")
    for seed in range(2):
        write_patch(root / f"patch{seed}", root / "model", seed)
    return root


def evaluate(capsys: pytest.CaptureFixture[str], world: Path, *arguments: object, code: int = 0) -> str:
    places = {"--model": world / "model", "--data-root": world / "data", "--include-path": world / "tasks"}
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *(str(word) for pair in places.items() for word in pair), *map(str, arguments)])
    assert ended.value.code == code
    out, error = capsys.readouterr()
    return error if code else out


def test_every_patch_is_scored_on_every_task(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patches = [word for seed in range(2) for word in ("--patch", world / f"patch{seed}")]
    items = tmp_path / "items.parquet"
    rows = json.loads(evaluate(capsys, world, "--tasks", "mood,tone", *patches, "--items", items, "--json"))
    at = [(row["task"], Path(row["patches"][0]).name, row["arm"], row["rank"], row["n"]) for row in rows]
    assert at == [(task, f"patch{seed}", "port", 2, 20) for seed in range(2) for task in ("mood", "tone")]
    assert all(tuple(row) == COLUMNS and row["metric"] == "acc" and 0 <= row["value"] <= 1 for row in rows)
    kept = pq.read_table(items)
    assert len(kept) == 80 and kept.column_names[:2] == ["task", "patch"]
    first = [item for item in kept.to_pylist() if item["task"] == "mood" and item["patch"].endswith("patch0")]
    assert sum(item["correct"] for item in first) / len(first) == pytest.approx(rows[0]["value"])


def test_the_model_is_loaded_once_and_scored_alone_without_a_patch(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from portllm.work import resident

    loads, load = [], resident._load
    monkeypatch.setattr(resident, "_load", lambda *a: (loads.append(a), load(*a))[1])
    asked = Asked(["mood", "tone"], world / "data", world / "tasks", limit=8)
    ported = list(score(world / "model", [world / "patch0", world / "patch1"], asked))
    assert len(ported) == 4 and len(loads) == 1
    alone = list(score(world / "model", [], asked))
    assert [(one.patch, one.rank, one.summary["n"]) for one in alone] == [(None, None, 8)] * 2
    adapter = Asked(["mood"], world / "data", world / "tasks", limit=8, apply="adapter")
    kept_apart = list(score(world / "model", [world / "patch0"], adapter))
    both = ([item["choice_loglikelihoods"] for item in one.items.to_pylist()] for one in (kept_apart[0], ported[0]))
    for apart, merged in zip(*both, strict=True):
        assert apart == pytest.approx(merged, abs=1e-4)


def test_how_far_each_cell_is_can_be_told(world: Path) -> None:
    told: list[At] = []
    patches = [world / "patch0", world / "patch1"]
    list(score(world / "model", patches, Asked(["mood", "tone"], world / "data", world / "tasks"), told.append))
    begun = [(at.cell, at.cells, at.task, at.patch) for at in told if at.total is None]
    assert begun == [(1, 4, "mood", patches[0]), (2, 4, "tone", patches[0]), (3, 4, "mood", patches[1]),
                     (4, 4, "tone", patches[1])]  # fmt: skip
    ends = {at.cell: (at.done, at.total) for at in told}
    assert ends == dict.fromkeys(range(1, 5), (40, 40))


class Terminal(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_terminal_shows_the_cell_and_its_requests_and_a_pipe_nothing(
    world: Path, monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", shown := stream())
    places = ["--model", str(world / "model"), "--data-root", str(world / "data")]
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *places, "--include-path", str(world / "tasks"), "--tasks", "mood,tone", "--json"])
    assert ended.value.code == 0
    words = ["[1/2] mood", "[2/2] tone", "40/40"] if stream is Terminal else []
    assert all(word in shown.getvalue() for word in words) and bool(shown.getvalue()) == bool(words)


def test_words_for_a_reader(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = evaluate(capsys, world, "--tasks", "mood", "--limit", 5, "--num-fewshot", 2)
    assert "mood" in shown and "acc" in shown and len(shown.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "moood"], "moood"),
        (["--tasks", ","], "--tasks"),
        (["--tasks", "mood", "--patch", "nowhere"], "no such patch directory"),
        (["--tasks", "sst2"], "no directory `sst2`"),
        (["--tasks", "mood", "--items", "nowhere/items.parquet"], "there is no directory nowhere"),
    ],
)
def test_bad_input_is_one_error(
    world: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    error = evaluate(capsys, world, *arguments, code=2)
    assert message in error and error.startswith("error: ") and "Traceback" not in error


@pytest.mark.parametrize("mend", ["missing", "label"])
def test_few_shot_examples_are_looked_at_first(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mend: str
) -> None:
    data = shutil.copytree(world / "data", tmp_path / "data")
    train = data / "mood" / "train.parquet"
    table = pq.read_table(train)
    train.unlink()
    if mend == "label":
        labels = pa.array([-1] * len(table))
        pq.write_table(table.set_column(table.column_names.index("label"), "label", labels), train)
    asked = ("--tasks", "mood", "--num-fewshot", 2, "--data-root", data)
    error = evaluate(capsys, world, *asked, code=2)
    assert "mood" in error and "train.parquet" in error and "Traceback" not in error


def test_a_window_that_leaves_no_room_for_a_prompt_is_refused_before_anything_is_loaded(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (world / "tasks" / "mood.yaml").read_text().replace("multiple_choice", "generate_until")
    (tmp_path / "mood.yaml").write_text(text + "generation_kwargs: {until: ['x'], max_gen_toks: 64}\n")
    error = evaluate(capsys, world, "--tasks", "mood", "--include-path", tmp_path, code=2)
    assert "task `mood`: generation_kwargs ask for up to 64 new tokens (max_gen_toks)" in error and "64 in all" in error


def test_prompts_that_were_cut_are_said(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = shutil.copytree(world / "model", tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 3}))
    places = ["--data-root", str(world / "data"), "--include-path", str(world / "tasks")]
    with pytest.raises(SystemExit):
        main(["evaluate", "--model", str(short), *places, "--tasks", "mood", "--json"])
    assert "prompts were cut from the left to fit the model's window" in capsys.readouterr().err


def test_a_cell_that_fails_is_named_and_what_was_scored_before_it_is_kept(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_patch(tmp_path / "broken", world / "model")
    weights = load_file(tmp_path / "broken" / "adapter_model.safetensors")
    save_file({name: tensor * 1e12 for name, tensor in weights.items()}, tmp_path / "broken/adapter_model.safetensors")
    items = tmp_path / "items.parquet"
    patches = ["--patch", world / "patch0", "--patch", tmp_path / "broken"]
    places = ["--model", world / "model", "--data-root", world / "data", "--include-path", world / "tasks"]
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *map(str, [*places, "--tasks", "mood", *patches, "--items", items, "--json"])])
    out, error = capsys.readouterr()
    assert ended.value.code == 1 and len(json.loads(out)) == 1 and len(pq.read_table(items)) == 20
    assert f"error: mood with {tmp_path}/broken: the score of document" in error


def test_items_go_into_a_file_and_a_directory_is_refused_first(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "a directory; name the file" in evaluate(capsys, world, "--tasks", "mood", "--items", tmp_path, code=2)
