"""What stands at a hub is pinned to a commit, by the study or by its lock."""

import json
from types import SimpleNamespace

import pytest

from portllm.errors import ResolveError
from portllm.resolve.lock import write_lock
from portllm.resolve.resolver import open_study
from portllm.study.plan import make_plan
from tests.resolve.studies import own_data


def test_an_unpinned_hub_id_gives_a_plan_that_does_not_run(copy):
    study, facts = open_study(copy, ["models.m={hub: a/b, shape: mistral-7b-v0.1}"])
    assert facts.unpinned == ("model:a/b",)
    assert make_plan(study, facts).unpinned == ("model:a/b",)
    pinned = open_study(copy, [f"models.m={{hub: a/b, revision: {'a' * 40}}}"])[1]
    assert pinned.unpinned == ()


def test_a_lock_pins_what_the_study_leaves_open(copy):
    lock = copy.with_name("study.lock.json")
    lock.write_text(json.dumps({"pins": {"model:a/b": "1" * 40}}))
    study, facts = open_study(copy, ["models.m={hub: a/b}"])
    assert facts.unpinned == () and study.models["m"].revision == "1" * 40
    lock.write_text(json.dumps({"pins": {"model:a/b": "main"}}))
    with pytest.raises(ResolveError, match="not a full commit sha"):
        open_study(copy, ["models.m={hub: a/b}"])


def test_tags_of_one_repository_are_pins_of_their_own(copy, monkeypatch):
    import huggingface_hub

    asked = []

    def repo_info(self, repository, *, revision, repo_type, timeout):
        asked.append((repository, revision, repo_type))
        return SimpleNamespace(sha=f"{len(asked)}" * 40)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    shape = "shape: mistral-7b-v0.1"
    overrides = [
        f"models.m={{hub: a/b, revision: step1, {shape}}}",
        f"models.n={{hub: a/b, revision: step2, {shape}}}",
        f"models.o={{hub: a/b, {shape}}}",
    ]
    ids = ["model:a/b@step1", "model:a/b@step2", "model:a/b"]
    assert open_study(copy, overrides)[1].unpinned == tuple(ids)
    write_lock(copy, ids)
    assert asked == [("a/b", "step1", "model"), ("a/b", "step2", "model"), ("a/b", None, "model")]
    study, facts = open_study(copy, overrides)
    assert [study.models[name].revision for name in "mno"] == [f"{n}" * 40 for n in (1, 2, 3)] and not facts.unpinned
    moved = open_study(copy, [f"models.m={{hub: a/b, revision: step3, {shape}}}"])[1]
    assert moved.unpinned == ("model:a/b@step3",)


def test_a_local_directory_as_a_data_set_is_not_the_hubs(copy):
    own_data(copy, "{}")
    file = copy.parent / "tasks" / "own.yaml"
    file.write_text(file.read_text().replace("dataset_path: parquet", f"dataset_path: {copy.parent / 'data' / 'mood'}"))
    facts = open_study(copy)[1]
    assert facts.unpinned == () and facts.tasks["own"].dataset is None and facts.tasks["own"].documents
