"""What goes wrong while running: the step fails with its log named, the rest goes on, the same command continues."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.toys import STUDY, portllm, write_world

SMALL = STUDY + "tracking: {enabled: false}\n"


@pytest.fixture
def world(tmp_path):
    return write_world(tmp_path / "w", SMALL)


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "portllm", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores Ctrl-C
    )


def lines_until(process, word):
    """Lines of standard error up to the first that holds a word."""
    found = []
    for line in process.stderr:
        found.append(line)
        if word in line:
            return found
    raise AssertionError(f"no line with {word!r}:\n{''.join(found)}")


def artifacts(store):
    """Every published file but the records, which hold times."""
    return {
        p.relative_to(store): p.read_bytes()
        for p in store.glob("artifacts/*/*/*")
        if p.is_file() and p.name not in ("record.json", "curve.jsonl", "provenance.json")
    }


def test_a_dead_worker_is_replaced_and_a_diverging_training_fails_alone_and_names_its_log(world, tmp_path):
    """One run with both. A learning rate that overflows float32 gives a loss that is not a number: not published."""
    store = tmp_path / "s"
    two = (
        "tasks=[{task: mood, include_path: tasks}, {task: tone, include_path: tasks, finetune: {learning_rate: 1e30}}]"
    )
    process = start("run", world, "--store", store, "--yes", "-o", two)
    lines_until(process, "examples mood")  # trainings begin
    os.kill(_wait_for_worker(process.pid), signal.SIGKILL)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 1, error
    assert "StageError" in error and "log: " in error and "is nan" in error
    log = error.rsplit("log: ", 1)[1].split()[0]
    assert "is nan" in Path(log).read_text()
    failures = [json.loads(p.read_text()) for p in store.glob("failures/*/*.json")]
    assert {f["type"] for f in failures} <= {"WorkerDied", "StageError"}
    states = {
        s["label"]: s["status"] for s in json.loads(portllm("status", world, "--store", store, "-o", two, "--json"))
    }
    assert states["finetune m t=0 tone r2 s0"] == "failed" and states["evaluate m t=0 tone port r2 s0"] == "missing"
    assert all(state == "published" for label, state in states.items() if "mood" in label)
    assert states["evaluate m t=0 tone none"] == "published"


def _wait_for_worker(driver, title="ray::Worker"):
    """Process id of a living warm worker below a driver's Ray, by its title: it names what it executes."""
    for _ in range(200):
        found = subprocess.run(["ps", "-eo", "pid,sid,args"], capture_output=True, text=True).stdout
        for line in found.splitlines():
            pid, _session, *arguments = line.split(maxsplit=2)
            if arguments and title in arguments[0] and _descends(int(pid), driver):
                return int(pid)
        time.sleep(0.1)
    raise AssertionError(f"no process {title!r} found")


def _descends(pid, ancestor):
    import psutil

    try:
        return ancestor in {p.pid for p in psutil.Process(pid).parents()}
    except psutil.NoSuchProcess:
        return False


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_a_training_that_is_told_to_stop_and_then_killed_goes_on_from_its_checkpoints(workers, world, tmp_path):
    """SIGTERM keeps the state and costs nothing; SIGKILL costs what came after the last checkpoint."""
    store, where = tmp_path / "s", f"resources.finetune={{workers: {workers}, checkpoint_s: 0.01}}"
    many = ["-o", "finetune={rank: 2, learning_rate: 1e-3, steps: 800, batch: 4}", "-o", "arms=[port]",
            "-o", "lineages={a: {model: m}}", "-o", "tasks=[{task: mood, include_path: tasks}]"]  # fmt: skip
    process = start("run", world, "--store", store, "--yes", *many, "-o", where)
    title, kept = "ray::finetune" if workers == 1 else "ray::RayTrainWorker", 0
    for stop, said in ((signal.SIGTERM, "Preempted: stopped after optimizer step"), (signal.SIGKILL, "WorkerDied")):
        kept = _newest_checkpoint(store, kept)
        os.kill(_wait_for_worker(process.pid, title), stop)
        lines_until(process, said)
        kept = _newest_checkpoint(store, 0)  # the last one of the attempt that ended
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    (record,) = (json.loads(path.read_text()) for path in store.glob("artifacts/finetune/*/record.json"))
    resumed = record["summary"]["resumed"]
    assert len(resumed) == 2 and 0 < resumed[0] < resumed[1] and record["summary"]["world"] == workers
    assert not list((store / "work").glob("*/step-*"))
    portllm("run", world, "--store", tmp_path / "whole", "--yes", *many, "-o", "resources.finetune.workers=1")
    mine, whole = (load_file(next(root.glob("artifacts/finetune/*/adapter_model.safetensors")))
                   for root in (store, tmp_path / "whole"))  # fmt: skip
    for name, tensor in whole.items():
        torch.testing.assert_close(mine[name], tensor, atol=0 if workers == 1 else 1e-3, rtol=0)


def _newest_checkpoint(store, above):
    """Optimizer step of a training's newest checkpoint, once it lies above a number."""
    for _ in range(2400):
        steps = [int(path.name.split("-")[1]) for path in store.glob("work/*/step-*-of-*")]
        if max(steps, default=0) > above:
            return max(steps)
        time.sleep(0.1)
    raise AssertionError(f"no checkpoint above optimizer step {above}")


def test_an_interrupted_run_says_so_and_a_killed_one_loses_nothing(tmp_path, finished):
    """Ctrl-C, then `kill -9`, then the same command: all it publishes has the bits of an undisturbed run in another
    store, whatever ran in a worker before."""
    world, store = finished[0], tmp_path / "s"
    process = start("run", world, "--store", store, "--yes")
    lines_until(process, "corpus c")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in error
    process = start("run", world, "--store", store, "--yes")
    lines_until(process, "] ")  # whichever step is the first to be published
    time.sleep(2 * random.random())
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = artifacts(store)
    assert before
    report = json.loads(portllm("run", world, "--store", store, "--yes", "--json"))
    assert report["failed"] == {}
    assert all(artifacts(store)[path] == content for path, content in before.items())
    portllm("run", world, "--store", store, "--yes")  # sweeps what a worker left that outlived its driver for a moment
    assert list((store / "attempts").iterdir()) == []
    ours, undisturbed = artifacts(store), artifacts(finished[1])
    assert len(ours) > 20 and [path for path in ours if ours[path] != undisturbed.get(path)] == []


def test_a_full_disk_fails_steps_and_the_same_command_continues(world, tmp_path):
    """A store on a file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=250k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        error = portllm("run", world, "--store", disk / "s", "--yes", code=1, PORTLLM_SCRATCH=str(tmp_path / "scratch"))
        assert "No space left" in error
        subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
        assert portllm("run", world, "--store", disk / "s", "--yes", PORTLLM_SCRATCH=str(tmp_path / "scratch")) == ""
    finally:
        subprocess.run(["umount", "-l", disk])
