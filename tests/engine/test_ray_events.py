"""What really ran, told by Ray itself: warm trainings, evaluation and a two-rank training in one study on two CPUs."""

import json

import pytest

from tests.engine.clusters import cluster, events, run
from tests.toys import STUDY, write_world

pytestmark = pytest.mark.long
"""100 s: Ray Train starts five processes besides the ranks. `test_two_nodes` has a gang among others in every run."""

MIXED = (
    STUDY
    + """
resources: {finetune: {workers: 2}}
tracking: {enabled: false}
arms: [port]
"""
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(store, report, tasks, actors) of the mixed study."""
    root = tmp_path_factory.mktemp("events")
    study = write_world(root / "w", MIXED)
    with cluster([{"num_cpus": 2}]) as ray_cluster:
        report = json.loads(run(ray_cluster.address, "run", study, "--store", root / "s", "--yes", "--json"))
        tasks, actors = events(ray_cluster.address)
    return root / "s", report, tasks, actors


def steps(tasks, prefix=""):
    names = ("requests", "examples", "corpus", "update", "finetune", "evaluate")
    return [t for t in tasks if t["name"].startswith(names) and t["name"].startswith(prefix)]


def test_warm_trainings_evaluation_and_a_gang_share_two_cpus_without_deadlock(ran):
    _, report, tasks, _ = ran
    assert report["failed"] == {} and report["blocked"] == []
    assert {t["name"] for t in steps(tasks)} == set(report["executed"])
    assert all(t["state"] == "FINISHED" for t in steps(tasks))


def test_no_worker_ran_beside_a_gang(ran):
    """Two CPUs, two ranks: warm workers were retired before."""
    _, _, tasks, actors = ran
    gangs = [(t["start_time_ms"], t["end_time_ms"]) for t in steps(tasks, "finetune")]
    assert len(gangs) == 1
    for other in (t for t in steps(tasks) if not t["name"].startswith("finetune")):
        assert not any(begin < other["start_time_ms"] < end for begin, end in gangs)
    assert {a["class_name"] for a in actors} >= {"Worker"}


def test_the_ranks_of_a_gang_saw_different_documents(ran):
    store, _, _, _ = ran
    for patch in store.glob("artifacts/finetune/*"):
        first, second = (json.loads((patch / f"documents.rank{r}.json").read_text()) for r in (0, 1))
        seen = [_flat(first), _flat(second)]
        assert seen[0] and seen[1] and not set(seen[0]) & set(seen[1])
        record = json.loads((patch / "record.json").read_text())
        assert record["summary"]["world"] == 2 and record["summary"]["zero"] in (1, 2)


def _flat(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [x for v in value for x in _flat(v)] if isinstance(value, list) else [value]
