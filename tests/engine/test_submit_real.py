"""`portllm submit` against a real head: dashboard, Jobs server and token, a study submitted from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from portllm.engine import submit as sut
from portllm.errors import EngineError
from tests.conftest import ROOT

SMALL = [
    "tasks=[{task: toy_mood, include_path: quickstart, limit: 50}]",
    "lineages={gentle: {model: toy, updates: [{corpus: diaries, method: lora, tokens: 4096, sequence_length: 64}]}}",
    "finetune={rank: 8, learning_rate: 5e-3, steps: 10}",
    "corpora.reviews.documents=1500",
    "corpora.diaries.documents=400",
    "models.toy.init.tokens=20480",
]
"""The quickstart in small."""
TOKEN = "a-token-of-this-test-0123456789abcdef"
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A running head, and the home whose token opens it."""

    address: str
    home: Path


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` with token authentication, its own ports and its own home; only its processes are ended."""
    gcs, dashboard, agent, client = free_ports(4)
    with tempfile.TemporaryDirectory(prefix="head-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)  # short: Ray puts sockets below it, and their names are limited to 107 bytes
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text(TOKEN)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= {"RAY_AUTH_MODE": "token", "HOME": folder, "PATH": f"{BIN}:{os.environ['PATH']}"}
        started = subprocess.Popen(
            [
                BIN / "ray",
                "start",
                "--head",
                "--block",
                "--node-ip-address=127.0.0.1",
                f"--port={gcs}",
                "--include-dashboard=true",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={dashboard}",
                f"--dashboard-agent-listen-port={agent}",
                f"--ray-client-server-port={client}",
                "--num-cpus=2",
                "--object-store-memory=100000000",
                f"--temp-dir={folder}/r",
                "--disable-usage-stats",
            ],
            env=environment,
            stdout=(home / "head.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        try:
            running = Head(f"127.0.0.1:{dashboard}", home)
            wait_until_ready(running, started)
            yield running
        finally:
            end(started)


def wait_until_ready(head: Head, started: subprocess.Popen[bytes]) -> None:
    environment = pytest.MonkeyPatch()
    environment.setenv("HOME", str(head.home))
    try:
        for _ in range(240):
            with contextlib.suppress(EngineError):
                sut.jobs(head.address)
                return
            assert started.poll() is None, (head.home / "head.log").read_text()
            time.sleep(0.5)
    finally:
        environment.undo()
    pytest.fail("the head did not start:\n" + (head.home / "head.log").read_text())


def end(started: subprocess.Popen[bytes]) -> None:
    """End the head and what it started, by process id: `ray stop` would end every Ray on this machine."""
    family = [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]
    started.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        started.wait(20)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    started.wait(20)


@pytest.fixture
def user(head: Head, monkeypatch: pytest.MonkeyPatch) -> Head:
    """This process as a user of the head: its token in the home, nothing else set."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(head.home))
    return head


def test_without_the_token_the_error_says_where_to_put_it(
    user: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(EngineError, match=r"refuses the token .*RAY_AUTH_TOKEN.*\.ray/auth_token"):
        sut.jobs(user.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-another-cluster-0123456789abcdef")
    with pytest.raises(EngineError, match="refuses the token"):
        sut.jobs(user.address)


def test_an_unknown_job_is_said_to_be_unknown(user: Head) -> None:
    with pytest.raises(EngineError, match="knows no job nonsense; `portllm jobs`"):
        sut.logs("nonsense", user.address)
    with pytest.raises(EngineError, match="knows no job nonsense"):
        sut.cancel("nonsense", user.address)


def submit_line(head: Head, line: str) -> str:
    """A job that is not a study."""
    with sut._client(head.address) as client:
        return str(client.submit_job(entrypoint=line, metadata={"portllm_study": "line"}))


def test_a_log_is_followed_to_its_end(user: Head) -> None:
    said: list[str] = []
    job = submit_line(user, "for i in 1 2 3; do echo line $i; sleep 0.3; done")
    sut.follow_job(job, user.address, said.append)
    lines = [line for line in "".join(said).splitlines() if line.startswith("line ")]  # Ray writes its own between them
    assert lines == ["line 1", "line 2", "line 3"]
    assert [j.status for j in sut.jobs(user.address) if j.id == job] == ["SUCCEEDED"]


def test_a_job_that_failed_or_was_stopped_is_no_success(user: Head) -> None:
    with pytest.raises(EngineError, match="failed"):
        sut.follow_job(submit_line(user, "exit 3"), user.address, lambda text: None)
    job = submit_line(user, "echo started; sleep 300")
    while not any(j.id == job and j.status == "RUNNING" for j in sut.jobs(user.address)):
        time.sleep(0.2)
    assert sut.cancel(job, user.address)
    with pytest.raises(EngineError, match="stopped"):
        sut.follow_job(job, user.address, lambda text: None)
    assert not sut.cancel(job, user.address)


def test_a_study_submitted_from_outside_publishes_its_results(
    user: Head, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Uploaded, run on the cluster, published in a store both see; submitted again it has nothing left to do."""
    study, store = ROOT / "jobs" / "quickstart.yaml", tmp_path / "store"
    job = sut.submit(study, address=user.address, store=str(store), overrides=SMALL, follow=True)
    assert any(j.id == job and j.study == "quickstart" and j.status == "SUCCEEDED" for j in sut.jobs(user.address))
    small = [word for assignment in SMALL for word in ("-o", assignment)]
    found = subprocess.run(
        [sys.executable, "-m", "portllm", "results", study, "--store", store, "--format", "csv", *small],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    assert {"none", "port", "refit"} <= set(found.replace("\n", ",").split(","))

    capsys.readouterr()
    sut.submit(study, address=user.address, store=str(store), overrides=SMALL, shared=True, follow=True)
    assert "are published" in capsys.readouterr().out
