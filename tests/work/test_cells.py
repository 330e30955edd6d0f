"""`portllm evaluate`: several patches in one load of the model, lm-eval's numbers, no study and no store."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from portllm.cli import main
from portllm.report.scores import score_notes, score_rows
from portllm.store.results import COLUMNS
from portllm.work import cells
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


def command(world: Path, *arguments: object) -> list[str]:
    places = ["--model", world / "model", "--data-root", world / "data", "--include-path", world / "tasks"]
    return ["evaluate", *map(str, [*places, *arguments])]


def ended(world: Path, *arguments: object) -> int:
    """The exit code of `portllm evaluate`."""
    with pytest.raises(SystemExit) as end:
        main(command(world, *arguments))
    assert isinstance(end.value.code, int)
    return end.value.code


def evaluate(capsys: pytest.CaptureFixture[str], world: Path, *arguments: object, code: int = 0) -> str:
    assert ended(world, *arguments) == code
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
    assert ended(world, "--tasks", "mood,tone", "--json") == 0
    words = ["[1/2] mood", "[2/2] tone", "40/40"] if stream is Terminal else []
    assert all(word in shown.getvalue() for word in words) and bool(shown.getvalue()) == bool(words)


def test_words_for_a_reader(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = evaluate(capsys, world, "--tasks", "mood", "--limit", 5, "--num-fewshot", 2)
    assert "mood" in shown and "acc" in shown and len(shown.splitlines()) == 2


def odd_tasks(world: Path) -> None:
    """Definitions that cannot be scored."""
    tasks = world / "tasks"
    (tasks / "circle.yaml").write_text("group: circle\ntask: [mood, ring]\n")
    (tasks / "ring.yaml").write_text("group: ring\ntask: circle\n")
    (tasks / "empty.yaml").write_text("group: empty\ntask: []\n")
    text = (tasks / "mood.yaml").read_text()
    for name, changed in {
        "odd_filter": text + "filter_list: [{name: x, filter: [{function: nosuch}]}]\n",
        "odd_metric": text.replace("metric: acc", "metric: ACC"),
        "no_metric": yaml.safe_dump(yaml.safe_load(text) | {"metric_list": []}),
    }.items():
        (tasks / f"{name}.yaml").write_text(changed.replace("task: mood", f"task: {name}"))
        if not (world / "data" / name).exists():
            (world / "data" / name).symlink_to("mood")


def test_data_that_nobody_named_are_not_looked_for(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--model", str(world / "model"), "--include-path", str(world / "tasks"), "--tasks", "mood"])
    assert end.value.code == 2 and "reads files and the definition names none" in capsys.readouterr().err


def test_patches_of_one_name_are_told_apart(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        shutil.copytree(world / f"patch{seed}", tmp_path / str(seed) / "lora")
    patches = [word for seed in range(2) for word in ("--patch", tmp_path / str(seed) / "lora")]
    lines = evaluate(capsys, world, "--tasks", "mood", "--limit", 4, *patches).splitlines()
    assert [line.split()[1] for line in lines] == ["patch", "0/lora", "1/lora"]
    assert len(set(map(len, lines))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "moood"], "moood"),
        (["--tasks", ","], "--tasks"),
        (["--tasks", "mood", "--patch", "nowhere"], "no such patch directory"),
        (["--tasks", "sst2"], "no directory `sst2`"),
        (["--tasks", "circle"], "group `circle` is a member of itself: circle > ring > circle"),
        (["--tasks", "empty"], "group `empty` has no tasks"),
        (["--tasks", "odd_filter"], "Unknown filter 'nosuch'"),
        (["--tasks", "odd_metric"], "computes none of the metrics that its metric_list names: ACC"),
        (["--tasks", "no_metric"], "its metric_list names no metric"),
        (["--tasks", "mood", "--items", "nowhere/items.parquet"], "there is no directory nowhere"),
    ],
)
def test_bad_input_is_one_error(
    world: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    odd_tasks(world)
    error = evaluate(capsys, world, *arguments, code=2)
    assert re.search(message, error) and error.startswith("error: ") and "Traceback" not in error


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
    ended(world, "--model", short, "--tasks", "mood", "--json")
    assert "requests were cut from the left to fit the model's window" in capsys.readouterr().err


def test_a_cell_that_fails_is_named_and_does_not_stop_the_others(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_patch(tmp_path / "broken", world / "model")
    weights = load_file(tmp_path / "broken" / "adapter_model.safetensors")
    save_file({name: tensor * 1e12 for name, tensor in weights.items()}, tmp_path / "broken/adapter_model.safetensors")
    items = tmp_path / "items.parquet"
    patches = ["--patch", tmp_path / "broken", "--patch", world / "patch0"]
    code = ended(world, "--tasks", "mood", *patches, "--items", items, "--json")
    out, error = capsys.readouterr()
    assert code == 1 and len(json.loads(out)) == 1 and len(pq.read_table(items)) == 20
    assert f"error: mood with {tmp_path}/broken: the score of document" in error


def test_a_task_whose_requests_cannot_be_made_does_not_stop_the_others(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = shutil.copytree(world / "tasks", tmp_path / "tasks")
    bare = yaml.safe_load((tasks / "mood.yaml").read_text())
    bare |= {"task": "bare", "target_delimiter": ""}  # ` : good` is two words, ` :good` is one
    (tasks / "bare.yaml").write_text(yaml.safe_dump(bare))
    (tmp_path / "data").mkdir()
    for name in ("mood", "bare"):
        (tmp_path / "data" / name).symlink_to(world / "data" / "mood")
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--model", str(world / "model"), "--data-root", str(tmp_path / "data"), "--include-path",
              str(tasks), "--tasks", "bare,mood", "--json"])  # fmt: skip
    out, error = capsys.readouterr()
    assert end.value.code == 1 and [row["task"] for row in json.loads(out)] == ["mood"]
    assert "error: bare: " in error and "no token of its own" in error


def test_items_go_into_a_file_and_a_directory_is_refused_first(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is no regular file" in evaluate(capsys, world, "--tasks", "mood", "--items", tmp_path, code=2)
    os.mkfifo(tmp_path / "pipe")
    assert "is no regular file" in evaluate(capsys, world, "--tasks", "mood", "--items", tmp_path / "pipe", code=2)


def test_items_that_cannot_be_written_cost_neither_the_scores_nor_the_old_file(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    items = tmp_path / "items.parquet"
    evaluate(capsys, world, "--tasks", "mood", "--limit", 3, "--items", items)
    kept = items.read_bytes()

    def full(table: pa.Table, file: Path, **_: object) -> None:
        if file.parent == tmp_path:
            raise OSError(28, "No space left on device")
        write(table, file, **_)

    write = pq.write_table
    monkeypatch.setattr(pq, "write_table", full)
    code = ended(world, "--tasks", "mood", "--limit", 5, "--items", items, "--json")
    out, error = capsys.readouterr()
    assert code == 1 and json.loads(out)[0]["n"] == 5
    assert f"error: {items}: the items cannot be written" in error and "No space left" in error
    assert items.read_bytes() == kept and list(tmp_path.iterdir()) == [items]


def test_how_the_cells_are_scored_is_what_was_asked(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes, scored = [], cells.evaluate
    monkeypatch.setattr(cells, "evaluate", lambda recipe, *rest: (recipes.append(recipe), scored(recipe, *rest))[1])
    asked = ["--tasks", "mood", "--patch", world / "patch0", "--apply", "adapter", "--dtype", "bfloat16"]
    assert ended(world, *asked, "--json") == 0 and [(r.apply, r.dtype) for r in recipes] == [("adapter", "bfloat16")]


def test_few_shot_examples_stand_in_the_prompts(world: Path) -> None:
    plain, shown = (
        next(score(world / "model", [], Asked(["mood"], world / "data", world / "tasks", num_fewshot=shots)))
        for shots in (None, 2)
    )
    assert (plain.summary["num_fewshot"], shown.summary["num_fewshot"]) == (0, 2)
    assert plain.items["choice_loglikelihoods"] != shown.items["choice_loglikelihoods"]


def test_what_was_scored_before_an_interrupt_is_printed(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored, calls = cells.evaluate, []

    def interrupted(*given: object) -> object:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return scored(*given)

    monkeypatch.setattr(cells, "evaluate", interrupted)
    code = ended(world, "--tasks", "mood,tone", "--json")
    out, error = capsys.readouterr()
    assert code == 130 and [row["task"] for row in json.loads(out)] == ["mood"] and "stopped" in error


def made_up(filters: tuple[str, ...], **noted: int) -> cells.Scored:
    metrics = [{"metric": "exact_match", "filter": name, "primary": True, "value": 0.5, "stderr": 0.1}
               for name in filters]  # fmt: skip
    summary = {"metrics": metrics, "n": 4, "num_fewshot": 0, "score_s": 1.0, **noted}
    return cells.Scored(None, None, "math", summary, pa.table({}))


def test_a_metric_bears_its_filter_where_there_are_several() -> None:
    names = [[row["metric"] for row in score_rows("m", "merged", "float32", [made_up(filters)])]
             for filters in (("strict",), ("strict", "flexible"))]  # fmt: skip
    assert names == [["exact_match"], ["exact_match,strict", "exact_match,flexible"]]


def test_batches_that_did_not_fit_are_said() -> None:
    assert list(score_notes([made_up(("none",), truncated=0, halved=0)])) == []
    assert "memory ran out 3 times" in next(score_notes([made_up(("none",), truncated=0, halved=3)]))


def test_a_task_that_brings_its_data_needs_no_directory_below_the_data_root(world: Path, tmp_path: Path) -> None:
    tasks = shutil.copytree(world / "tasks", tmp_path / "tasks")
    text = (tasks / "mood.yaml").read_text().replace("task: mood", "task: own")
    rows = world / "data" / "mood" / "validation.parquet"
    (tasks / "own.yaml").write_text(f"{text}\ndataset_kwargs: {{data_files: {{train: {rows}, validation: {rows}}}}}\n")
    found = list(score(world / "model", [], Asked(["mood", "own"], world / "data", tasks)))
    assert [one.task for one in found] == ["mood", "own"]
    assert found[0].items["choice_loglikelihoods"] == found[1].items["choice_loglikelihoods"]


def test_a_model_without_a_tokenizer_is_refused_first(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copytree(world / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    error = evaluate(capsys, world, "--tasks", "mood", "--model", bare, code=2)
    assert f"no tokenizer can be read from {bare}" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_went_away_is_no_error(unbuffered: str) -> None:
    asked = [sys.executable, "-c", "from portllm.cli import main; main(['schema'])"]
    ours = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ours) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141


def test_a_command_that_is_told_to_end_leaves_nothing_behind(world: Path, tmp_path: Path) -> None:
    ours = os.environ | {"TMPDIR": str(tmp_path)}
    asked = [sys.executable, "-c", "from portllm.cli import main; main()"]
    asked += command(world, "--tasks", "mood,tone", *["--patch", world / "patch0"] * 200)
    with subprocess.Popen(asked, stdout=subprocess.DEVNULL, env=ours) as process:
        until = time.monotonic() + 60
        while not list(tmp_path.glob("portllm-*/cells")) and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert list(tmp_path.glob("portllm-*")) == []
