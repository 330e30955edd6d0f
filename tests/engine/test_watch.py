"""A running step is seen: what it writes of itself, the terminal's line, MLflow's curve."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import threading
import time
from types import SimpleNamespace

import pytest

from portllm.engine import watch
from portllm.engine.progress import _left, far, one_line
from portllm.engine.watch import Reporter, Watch
from portllm.engine.workers import prepare
from portllm.store.layout import StoreLayout
from portllm.study.resources import Layout
from tests.toys import STUDY, write_world


@pytest.fixture
def path(tmp_path):
    return tmp_path / "work" / "key" / "watch.jsonl"


def test_a_step_that_is_quickly_done_leaves_no_file(path):
    report = Reporter(path)
    report(1, 2)
    report(2, 2)
    assert not path.parent.exists() and Watch(path).news() == []


def test_every_point_of_a_curve_is_told_once_and_in_order(path, monkeypatch):
    monkeypatch.setattr(watch, "PAUSE", 0.02)
    report, seen, found = Reporter(path), Watch(path), []
    for step in range(1, 51):
        report(step, 50, loss=1 / step)
        time.sleep(0.002)
        found += seen.news()
    assert len(found) > 5
    assert found == [{"done": n, "total": 50, "loss": 1 / n} for n in range(1, len(found) + 1)]
    assert seen.last == found[-1]


def test_half_a_line_waits_for_its_other_half(path):
    path.parent.mkdir(parents=True)
    seen = Watch(path)
    path.write_text('{"done": 1, "total": 9}\n{"done": 2, ')
    assert [line["done"] for line in seen.news()] == [1]
    path.write_text('{"done": 1, "total": 9}\n{"done": 2, "total": 9}\n')
    assert [line["done"] for line in seen.news()] == [2] and seen.news() == []


def test_a_file_that_another_driver_began_anew_is_no_error(path):
    path.parent.mkdir(parents=True)
    seen = Watch(path)
    path.write_text('{"done": 1, "total": 9}\n')
    seen.news()
    path.write_text('{"done": 1000, "total": 9999, "loss": 1.0}\n{"done": 1001, "total": 9999, "loss": 1.0}\n')
    assert [line["done"] for line in seen.news()] == [1001]


def test_what_an_earlier_attempt_wrote_is_forgotten(path):
    path.parent.mkdir(parents=True)
    path.write_text('{"done": 7, "total": 9}\n')
    assert Watch(path).news() == []


def test_a_full_disk_does_not_stop_the_step(path, monkeypatch):
    monkeypatch.setattr(watch, "PAUSE", 0)
    path.parent.parent.write_text("a file where the directory should be")
    Reporter(path)(1, 2)


@pytest.mark.parametrize(
    "line, text",
    [
        (None, "evaluate sst2"),
        ({"done": 30, "total": 872}, "evaluate sst2  30/872"),
        (
            {"done": 3, "total": 9, "loss": 1.23456, "tokens_per_s": 1234.5},
            "evaluate sst2  3/9 · loss 1.235 · 1,234 tokens/s",
        ),
    ],
)
def test_the_line_says_how_far_a_step_is(line, text):
    assert far("evaluate sst2", line) == text


def test_a_single_step_draws_one_line_over_itself(capsys):
    show = one_line("finetune sst2")
    show(1, 2, loss=0.7, tokens_per_s=10.0)
    show(2, 2, loss=0.6, tokens_per_s=10.0)
    assert capsys.readouterr().err == (
        "\r\x1b[Kfinetune sst2  1/2 · loss 0.700 · 10 tokens/s\r\x1b[Kfinetune sst2  2/2 · loss 0.600 · 10 tokens/s\n"
    )


def test_the_time_left_is_at_least_that_of_the_longest_running_step():
    assert _left(40.0, 2, 2, 0.0) == "about 40 s left"
    assert _left(40.0, 2, 2, 900.0) == "about 15 min left"
    assert _left(40.0, 0, 2, 0.0) == "time left unknown"


@pytest.mark.real
def test_terminal_and_mlflow_follow_a_training_while_it_runs(tmp_path):
    """Then SIGTERM: the training keeps its state, and MLflow's run, which was RUNNING, is no longer."""
    world, store, steps = write_world(tmp_path / "w", STUDY), tmp_path / "s", 100_000
    options = [f"finetune={{rank: 2, learning_rate: 1e-3, steps: {steps}, batch: 32}}", "arms=[port]",
               # Many passes a step: some 20 steps a second.
               "resources.finetune={micro_tokens: 16, checkpoint_s: 1000}",
               "lineages={a: {model: m}}", "tasks=[{task: mood, include_path: tasks}]"]  # fmt: skip
    command = [sys.executable, "-m", "portllm", "run", world, "--store", store, "--yes"]
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    process = subprocess.Popen(
        [*map(str, command), *(part for option in options for part in ("-o", option))],
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    shown = bytearray()
    threading.Thread(target=_read, args=(terminal, shown), daemon=True).start()
    try:
        steps_in_mlflow = _wait(lambda: _curve(store))
        assert _wait(lambda: re.search(rb"finetune m t=0 mood r2 s0  \d+/100000 \xc2\xb7 loss \d", shown))
        assert _wait(lambda: len(_curve(store)) > len(steps_in_mlflow))
        assert process.poll() is None and _status(store) == "RUNNING"
        assert not list(store.glob("work/*/step-*"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    finally:
        process.kill()
    curve = _curve(store)
    assert curve == list(range(1, len(curve) + 1)) and _status(store) == "FAILED"
    (kept,) = store.glob("work/*/step-*")
    assert int(kept.name.split("-")[1]) >= len(curve)


def _read(terminal, shown):
    while True:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            return


def _wait(condition, seconds=120):
    for _ in range(2 * seconds):
        if found := condition():
            return found
        time.sleep(0.5)
    raise AssertionError("it did not come to pass")


def _query(store, query):
    """Rows of MLflow's own database: its client would migrate what the run is just making."""
    with contextlib.suppress(sqlite3.OperationalError):
        connection = sqlite3.connect(f"file:{store / 'mlflow.db'}?mode=ro", uri=True)
        with contextlib.closing(connection):
            return connection.execute(query).fetchall()
    return []


def _curve(store):
    """Steps whose loss MLflow has."""
    return [step for (step,) in _query(store, "select step from metrics where key = 'loss' order by step")]


def _status(store):
    query = "select status from runs join tags using (run_uuid) where key = 'stage' and value = 'finetune'"
    ((status,),) = _query(store, query)
    return status


def test_what_an_earlier_attempt_was_told_does_not_stop_this_one(tmp_path):
    step = SimpleNamespace(key="k", label="l", layout=Layout(), coordinates={})
    context = SimpleNamespace(rank=0)
    stop = StoreLayout(tmp_path).stop("k")
    stop.parent.mkdir(parents=True)
    stop.touch()
    prepare(context, SimpleNamespace(step=step, store=tmp_path))
    assert not context.stop()
    stop.touch()
    assert context.stop()
