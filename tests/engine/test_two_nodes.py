"""Two raylets with two logical GPUs each: every step asks for what `plan` printed, and a gang spans both nodes."""

import json
import threading
import time

import pytest

from tests.engine.clusters import cluster, events, run, spawned
from tests.toys import STUDY, write_world

WIDE = (
    STUDY
    + """
resources:
  update: {workers: 4, gpus: 1}
  finetune: {gpus: 1}
  evaluate: {gpus: 1}
tracking: {enabled: false}
arms: [port]
"""
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(plan, tasks, actors, placement groups seen while it ran)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORTLLM_LOGICAL_GPUS", "1")
        yield from observed(tmp_path_factory)


def observed(tmp_path_factory):
    root = tmp_path_factory.mktemp("nodes")
    study = write_world(root / "w", WIDE)
    planned = json.loads(run("", "plan", study, "--store", root / "s", "--json"))
    groups: dict = {}
    with cluster([{"num_cpus": 3, "num_gpus": 2}, {"num_cpus": 3, "num_gpus": 2}]) as ray_cluster:
        watch = _Watch(ray_cluster.address, groups)
        report = json.loads(run(ray_cluster.address, "run", study, "--store", root / "s", "--yes", "--json"))
        watch.stop()
        tasks, actors = events(ray_cluster.address)
    assert report["failed"] == {}
    yield planned, tasks, actors, groups


class _Watch:
    """Keeps every placement group that was ever alive; a removed one no longer tells where its bundles were."""

    def __init__(self, address, groups):
        self.address, self.groups, self.going = address, groups, True
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self):
        import ray
        from ray.util import placement_group_table

        ray.init(address=self.address, log_to_driver=False)
        while self.going:
            for name, group in placement_group_table().items():
                if group["state"] == "CREATED":
                    self.groups[name] = group
            time.sleep(0.3)

    def stop(self):
        self.going = False
        self.thread.join()


def test_workers_hold_what_the_plan_printed(ran):
    planned, tasks, actors, _ = ran
    asked = {s["label"]: s["resources"] for s in planned["steps"]}
    held = {a["actor_id"]: a["required_resources"] for a in actors if a["class_name"] == "Worker"}
    checked = 0
    for task in tasks:
        resources = asked.get(task["name"])
        if resources and resources["workers"] == 1:
            actor = held[task["actor_id"]]
            assert actor.get("CPU", 0) == resources["threads"] and actor.get("GPU", 0) == resources["gpus"]
            checked += 1
    assert checked == len([r for r in asked.values() if r["workers"] == 1])


def test_evaluators_hold_their_gpu(ran):
    _planned, tasks, actors, _ = ran
    evaluators = {t["actor_id"] for t in tasks if t["name"].startswith("evaluate")}
    assert evaluators
    for actor in actors:
        if actor["actor_id"] in evaluators:
            assert actor["required_resources"]["GPU"] == 1


def test_a_gang_of_four_spans_both_nodes(ran):
    _, _, _, groups = ran
    wide = [g for g in groups.values() if sum(b.get("GPU", 0) for b in g["bundles"].values()) == 4]
    assert wide
    for group in wide:
        nodes = [group["bundles_to_node_id"][i] for i, b in group["bundles"].items() if b.get("GPU")]
        assert len(nodes) == 4 and len(set(nodes)) == 2


def test_nothing_that_holds_a_gpu_ran_beside_a_gang_of_all_of_them(ran):
    _, tasks, _, _ = ran
    ((begin, end),) = [(t["start_time_ms"], t["end_time_ms"]) for t in tasks if t["name"].startswith("update")]
    others = [t for t in tasks if t["name"].startswith(("finetune", "evaluate"))]
    assert others and not any(begin < t["start_time_ms"] < end for t in others)


def test_steps_ran_at_once_in_different_processes(ran):
    planned, tasks, _, _ = ran
    labels = {step["label"] for step in planned["steps"]}
    spans = sorted((t["start_time_ms"], t["end_time_ms"], t["worker_pid"]) for t in tasks if t["name"] in labels)
    assert len(spans) == len(labels)
    assert any(b[0] < a[1] and a[2] != b[2] for i, a in enumerate(spans) for b in spans[i + 1 :])


@pytest.mark.long
def test_a_gang_whose_node_is_lost_waits_for_none_and_goes_on_once_there_is_another(tmp_path):
    study = write_world(tmp_path / "w", STUDY + "tracking: {enabled: false}\n")
    store = tmp_path / "s"
    command = ["run", study, "--store", store, "--yes", "-o", "arms=[port]", "-o", "lineages={a: {model: m}}",
               "-o", "finetune={rank: 2, learning_rate: 1e-3, steps: 600, batch: 4}",
               "-o", "resources={finetune: {workers: 2, checkpoint_s: 0.01}}"]  # fmt: skip
    with cluster([{"num_cpus": 1}], dashboard=False) as ray_cluster:
        lost = ray_cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        with spawned(ray_cluster.address, *command) as process:
            deadline = time.monotonic() + 120
            while not list(store.glob("work/*/step-*-of-*")) and time.monotonic() < deadline:
                time.sleep(0.1)
            ray_cluster.remove_node(lost)
            _, error = process.communicate(timeout=120)
        assert process.returncode == 1 and "WorkerDied" in error, error
        assert "no node is left that could run one" in error
        ray_cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        run(ray_cluster.address, *command)
    (record,) = (json.loads(path.read_text()) for path in store.glob("artifacts/finetune/*/record.json"))
    assert record["summary"]["resumed"] and record["summary"]["world"] == 2
