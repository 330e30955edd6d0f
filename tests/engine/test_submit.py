"""What `portllm submit` sends, without a cluster."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from portllm.engine import submit as sut
from portllm.engine.start import GRACE_S
from portllm.errors import EngineError, ResolveError, SpecError
from portllm.resolve.lock import lock_path
from portllm.study.spec import Study, load

STUDY = """
name: tiny
data_root: data
models: {{m: {{path: model}}}}
corpora: {{c: {{path: {corpus}, text: text}}}}
lineages: {{l: {{model: m, updates: [{{corpus: c, method: lora, rank: 4, tokens: 1000}}]}}}}
tasks: [sst2]
finetune: {{rank: 8, alpha: 16, examples: 10, epochs: 1, learning_rate: 5e-3}}
"""


def write_study(folder: Path, corpus: str = "corpus.jsonl") -> tuple[Path, Study]:
    """A study with a model, a corpus, a task and things that must stay at home."""
    for name in (
        "model/config.json",
        "data/sst2/train.parquet",
        "data/rte/train.parquet",
        "unrelated.bin",
        "corpus.jsonl",
        "study.lock.json",
        "model/.git/HEAD",
        "model/env/pyvenv.cfg",
        "model/x.pyc",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    file = folder / "study.yaml"
    file.write_text(STUDY.format(corpus=corpus))
    return file, load(file.read_text(), str(file))[0]


def test_the_study_its_lock_and_what_it_names_travel_and_nothing_else(tmp_path: Path) -> None:
    file, study = write_study(tmp_path)
    package = sut.pack(file, study, "/mnt/store", shared=False)
    names = {str(f.relative_to(tmp_path)) for f in package.files}
    assert names == {"study.yaml", "study.lock.json", "corpus.jsonl", "model/config.json", "data/sst2/train.parquet"}
    assert package.study == "study.yaml" and package.store == "/mnt/store"


def test_groups_travel_as_their_tasks_and_a_deepspeed_configuration_with_its_study(tmp_path: Path) -> None:
    file, _ = write_study(tmp_path)
    own = {"task": "own", "dataset_path": "parquet", "dataset_kwargs": {"data_files": {"validation": "/mnt/v.parquet"}}}
    for name, content in (
        ("tasks/both.yaml", {"group": "both", "task": ["sst2", "rte", "own"]}),
        ("tasks/own.yaml", own),
        ("ds.json", {}),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(yaml.safe_dump(content))
    asked = ["tasks=[{task: both, include_path: tasks}]", "resources={finetune: {deepspeed: ds.json}}"]
    package = sut.pack(file, load(file.read_text(), str(file), asked)[0], "/mnt/store", shared=False)
    names = {str(f.relative_to(tmp_path)) for f in package.files}
    assert names == {"study.yaml", "study.lock.json", "corpus.jsonl", "model/config.json", "ds.json", "tasks/both.yaml",
                     "tasks/own.yaml", "data/sst2/train.parquet", "data/rte/train.parquet"}  # fmt: skip
    with pytest.raises(ResolveError, match="has no directory `wnli`"):
        sut.pack(file, load(file.read_text(), str(file), ["tasks=[wnli]"])[0], "/mnt/store", shared=False)


def test_definitions_on_the_cluster_are_not_looked_for_here(tmp_path: Path) -> None:
    file, _ = write_study(tmp_path)
    asked = ["tasks=[{task: rte, include_path: /cluster/tasks}, {task: other, include_path: /cluster/tasks}]"]
    package = sut.pack(file, load(file.read_text(), str(file), asked)[0], "/mnt/store", shared=False)
    assert tmp_path / "data/rte/train.parquet" in package.files


def test_the_package_keeps_every_file_in_its_place(tmp_path: Path) -> None:
    file, study = write_study(tmp_path / "home")
    target = tmp_path / "scratch"
    env = sut.runtime_env(sut.pack(file, study, "/mnt/store", shared=False), target, source=tmp_path / "portllm")
    assert env["working_dir"] == str(target) and env["py_modules"] == [str(tmp_path / "portllm")]
    assert (target / "data/sst2/train.parquet").read_text() == "x"
    assert not (target / "unrelated.bin").exists()


def test_a_path_that_leaves_the_folder_is_refused_with_its_field(tmp_path: Path) -> None:
    file, study = write_study(tmp_path / "jobs", corpus="../corpus.jsonl")
    with pytest.raises(SpecError, match=r"corpora\.c\.path: \.\./corpus\.jsonl leaves the study's folder.*--shared"):
        sut.pack(file, study, "/mnt/store", shared=False)


def test_linked_folders_travel_once_and_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "far/deep").mkdir(parents=True)
    (tmp_path / "far/deep/weights").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/linked").symlink_to(tmp_path / "far")
    (tmp_path / "far/round").symlink_to(tmp_path / "model")
    assert list(sut.walk(tmp_path / "no.lock.json")) == []
    assert list(sut.walk(tmp_path / "model")) == [tmp_path / "model/linked/deep/weights"]
    (tmp_path / "model/gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SpecError, match="model/gone is a link that leads nowhere"):
        list(sut.walk(tmp_path / "model"))


def test_an_absolute_path_is_the_clusters_and_stays_as_it_is(tmp_path: Path) -> None:
    file, study = write_study(tmp_path, corpus="/mnt/data/corpus.jsonl")
    assert tmp_path / "corpus.jsonl" not in sut.pack(file, study, "/mnt/store", shared=False).files


def test_a_missing_file_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    file, study = write_study(tmp_path, corpus="absent.jsonl")
    with pytest.raises(SpecError, match=r"corpora\.c\.path: .*absent\.jsonl does not exist"):
        sut.pack(file, study, "/mnt/store", shared=False)


def test_more_than_ray_uploads_is_refused_and_the_largest_file_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, study = write_study(tmp_path)
    (tmp_path / "corpus.jsonl").write_text("x" * 4000)
    monkeypatch.setattr(sut, "UPLOAD_LIMIT", 3000)
    with pytest.raises(SpecError, match="largest: corpus.jsonl"):
        sut.pack(file, study, "/mnt/store", shared=False)


@pytest.mark.parametrize("store", [None, "results"])
def test_an_uploaded_study_needs_a_store_that_outlives_the_job(tmp_path: Path, store: str | None) -> None:
    file, study = write_study(tmp_path)
    with pytest.raises(SpecError, match="--store with an absolute path"):
        sut.pack(file, study, store, shared=False)


def test_a_shared_study_runs_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, study = write_study(tmp_path / "jobs", corpus="../corpus.jsonl")
    monkeypatch.chdir(tmp_path)
    package = sut.pack(Path("jobs/study.yaml"), study, None, shared=True)
    assert package.study == str(file) and package.files == ()
    assert package.store == str(tmp_path / "portllm-store")
    env = sut.runtime_env(package, tmp_path / "unused", source=None)
    assert env == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "40"}} and sut.STOP_WAIT_S > GRACE_S + 10


def test_the_entrypoint_survives_the_shell(tmp_path: Path) -> None:
    package = sut.Package("my study.yaml", "/mnt/store", (), tmp_path)
    line = sut.entrypoint(package, ["lineages.l.updates=[{tokens: 5}]", "name=a b"])
    assert shlex.split(line) == [
        "python",
        "-m",
        "portllm",
        "run",
        "my study.yaml",
        "--yes",
        "--address",
        "auto",
        "--store",
        "/mnt/store",
        "-o",
        "lineages.l.updates=[{tokens: 5}]",
        "-o",
        "name=a b",
    ]


def test_the_token_is_found_where_ray_keeps_it(tmp_path: Path) -> None:
    assert sut.auth_headers({}, tmp_path) == {}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("from-home\n")
    (tmp_path / "token").write_text("from-file")
    by_path = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert sut.auth_headers({}, tmp_path) == {"Authorization": "Bearer from-home"}
    assert sut.auth_headers(by_path, tmp_path) == {"Authorization": "Bearer from-file"}
    assert sut.auth_headers(by_path | {"RAY_AUTH_TOKEN": "given"}, tmp_path) == {"Authorization": "Bearer given"}
    assert sut.auth_headers({"RAY_AUTH_MODE": "disabled"}, tmp_path) == {}


@pytest.mark.parametrize(
    "given, asked", [("head:8265", "http://head:8265"), ("http://h:1", "http://h:1"), ("auto", "auto"), (None, None)]
)
def test_a_bare_host_and_port_is_the_dashboard(given: str | None, asked: str | None) -> None:
    assert sut.dashboard_url(given) == asked


def test_an_address_given_in_so_many_words_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    with pytest.raises(EngineError, match=r"no Ray dashboard at 127\.0\.0\.1:9 .*--address"):
        sut.jobs("127.0.0.1:9")


def test_job_ids_are_readable_and_new_every_time() -> None:
    first, second = sut.job_id("tiny", now=0), sut.job_id("tiny", now=0)
    assert first.startswith("portllm-tiny-19700101-000000-") and first != second


def test_a_log_that_was_cut_is_not_written_twice() -> None:
    class Client:
        calls = 0

        async def tail_job_logs(self, _: str):  # type: ignore[no-untyped-def]
            self.calls += 1
            yield "one\n"
            if self.calls == 1:
                raise RuntimeError("connection closed")
            yield "two\n"

    import asyncio

    written: list[str] = []
    client = Client()
    shown = asyncio.run(sut._tail(client, "job", 0, written.append))  # type: ignore[arg-type]
    shown = asyncio.run(sut._tail(client, "job", shown, written.append))  # type: ignore[arg-type]
    assert "".join(written) == "one\ntwo\n" and shown == 8


def test_a_job_that_is_not_ours_is_listed_without_a_study() -> None:
    details = SimpleNamespace(
        submission_id="x", status="STOPPED", metadata=None, start_time=1000, end_time=3000, message=None
    )
    job = sut._job(details)
    assert (job.study, job.status, job.wall_s) == ("", "STOPPED", 2.0)


def test_a_linked_study_travels_as_the_file_it_leads_to(tmp_path: Path) -> None:
    file, study = write_study(tmp_path)
    (tmp_path / "latest.yaml").symlink_to(file.name)
    package = sut.pack(tmp_path / "latest.yaml", study, "/mnt/store", shared=False)
    assert package.study == "study.yaml" and tmp_path / "study.yaml" in package.files
    assert tmp_path / "study.lock.json" in package.files
    assert lock_path(tmp_path / "latest.yaml") == tmp_path / "study.lock.json"


def test_a_study_that_is_no_utf_8_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(SpecError, match=r"s\.yaml: cannot be read as a study file"):
        sut.submit(tmp_path / "s.yaml", address="127.0.0.1:9")


def test_a_store_below_the_home_directory_is_found_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from portllm.cli import _store

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file, _ = write_study(tmp_path)
    study = load(file.read_text(), str(file), ["store=~/results"])[0]
    assert sut.pack(file, study, None, shared=True).store == str(tmp_path / "home/results")
    assert _store(study, file, None).root == tmp_path / "home/results"
