"""The store: an artifact exists entirely or not at all, and the first publication wins."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from portllm.errors import StoreError
from portllm.store import store as sut
from portllm.store.store import Store, file_table, verify, write_json

KEY = "k" * 64


def publish(store, text="x", key=KEY):
    attempt = store.begin(store.new_attempt(key))
    (attempt / "sub").mkdir()
    (attempt / "sub" / "a.txt").write_text(text)
    return store.publish(attempt, "update", key, {"wall_s": 1.0, "summary": {}})


def test_a_published_artifact_is_whole_read_only_and_recorded(tmp_path):
    store = Store(tmp_path).create()
    assert publish(store) and store.has("update", KEY) and store.published(["update", "base"]) == {KEY}
    path = store.path("update", KEY)
    record = store.record("update", KEY)
    assert record["key"] == KEY and record["files"].keys() == {"sub/a.txt"}
    assert (path / "sub" / "a.txt").stat().st_mode & 0o222 == 0
    assert verify(path, record) == [] and list((tmp_path / "attempts").iterdir()) == []


def test_the_first_publication_wins(tmp_path):
    store = Store(tmp_path).create()
    first, second = store.begin(store.new_attempt(KEY)), store.begin(store.new_attempt(KEY))
    (first / "a").write_text("first")
    (second / "a").write_text("second")
    assert store.publish(first, "base", KEY, {}) and not store.publish(second, "base", KEY, {})
    assert (store.path("base", KEY) / "a").read_text() == "first" and not second.exists()


@pytest.mark.parametrize("record", [None, "", '{"key": '])
def test_a_published_step_whose_record_is_lost_is_published_anew(tmp_path, record):
    store = Store(tmp_path).create()
    publish(store)
    path = store.path("update", KEY) / "record.json"
    path.unlink()
    if record is not None:
        path.write_text(record)
    assert publish(store) and verify(store.path("update", KEY), store.record("update", KEY)) == []
    assert not publish(store)


def test_a_record_without_files_is_damaged(tmp_path):
    with pytest.raises(StoreError, match="it names no files"):
        verify(tmp_path, {"a": 1})


def test_a_flipped_bit_a_lost_file_and_a_new_file_are_found(tmp_path):
    store = Store(tmp_path).create()
    publish(store)
    path = store.path("update", KEY)
    file = path / "sub" / "a.txt"
    file.chmod(0o644)
    file.write_text("y")
    (path / "new").write_text("")
    assert verify(path, store.record("update", KEY)) == ["new", "sub/a.txt"]


def _publish_forever(root):
    store = Store(root)
    for i in range(10**6):
        publish(store, "x" * 10_000, f"{i:064d}")


@pytest.mark.parametrize("delay", [0.02, 0.05, 0.11])
def test_a_killed_process_leaves_whole_artifacts_and_its_rest_is_swept(tmp_path, delay):
    store = Store(tmp_path).create()
    process = multiprocessing.get_context("fork").Process(target=_publish_forever, args=(tmp_path,))
    process.start()
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    for key in store.published(["update"]):
        assert verify(store.path("update", key), store.record("update", key)) == []
    store.recover()
    assert list((tmp_path / "attempts").iterdir()) == []


def test_recover_discards_an_artifact_whose_record_does_not_parse_and_spares_living_attempts(tmp_path):
    store = Store(tmp_path).create()
    publish(store)
    record = store.path("update", KEY) / "record.json"
    record.chmod(0o644)
    record.write_text('{"key": ')
    with pytest.raises(StoreError, match="is damaged .*: remove .*, and the next `portllm run` makes it again"):
        store.record("update", KEY)
    mine = store.begin(store.new_attempt("j" * 64))
    assert store.recover() == [KEY] and not store.has("update", KEY) and mine.exists()


def test_failures_are_kept_in_order(tmp_path):
    store = Store(tmp_path).create()
    for i in range(3):
        store.fail(KEY, {"type": "StageError", "message": str(i)})
    assert [f["message"] for f in store.failures(KEY)] == ["0", "1", "2"]


def test_a_store_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="--store"):
        Store(tmp_path / "file").create()


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
    assert file_table(tmp_path)["a.json"]["bytes"] == path.stat().st_size


def test_a_publication_between_the_look_and_the_move_stays(tmp_path, monkeypatch):
    """Another run publishes while this one takes what is damaged for what lies there."""
    store = Store(tmp_path).create()
    publish(store)
    (store.path("update", KEY) / "record.json").unlink()
    real, looked = sut._damaged, []

    def late(path):
        found = real(path)
        if not looked:  # right after this run's look
            looked.append(path)
            assert publish(store, "theirs")
        return found

    attempt = store.begin(store.new_attempt(KEY))
    (attempt / "a.txt").write_text("mine")
    monkeypatch.setattr(sut, "_damaged", late)
    monkeypatch.setattr(Store, "has", lambda *_: False)  # the first look saw nothing
    assert not store.publish(attempt, "update", KEY, {})
    assert (store.path("update", KEY) / "sub" / "a.txt").read_text() == "theirs" and not attempt.exists()
    assert list((tmp_path / "attempts").iterdir()) == []


def test_a_record_that_cannot_be_read_right_now_is_left_alone(tmp_path):
    store = Store(tmp_path).create()
    publish(store)
    record = store.path("update", KEY) / "record.json"
    record.unlink()
    record.mkdir()  # reading it is an OSError, as of a network drive
    assert store.recover() == [] and store.path("update", KEY).is_dir()
