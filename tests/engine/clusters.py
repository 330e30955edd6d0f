"""A real Ray cluster of several raylets on this machine, with the dashboard that serves Ray's own events."""

import contextlib
import os
import subprocess
import sys


@contextlib.contextmanager
def cluster(nodes, dashboard=True):
    """Yield a cluster's address; `nodes` are the resources of each raylet."""
    import ray
    from ray.cluster_utils import Cluster

    first, *others = nodes
    head = {**first, "include_dashboard": dashboard, "object_store_memory": 100 * 2**20}
    started = Cluster(initialize_head=True, head_node_args=head)
    try:
        for node in others:
            started.add_node(**node, object_store_memory=100 * 2**20)
        yield started
    finally:
        ray.shutdown()
        started.shutdown()


def run(address, *arguments, code=0):
    """`portllm` against a cluster, in a process of its own; returns standard output."""
    found = subprocess.run(
        [sys.executable, "-m", "portllm", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"RAY_ADDRESS": address},
        timeout=420,
    )
    assert found.returncode == code, f"{found.stdout[-2000:]}\n{found.stderr[-6000:]}"
    return found.stdout


def events(address):
    """Ray's own events: tasks and actors, as the state API tells them."""
    import ray
    from ray.util.state import list_actors, list_tasks

    ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
    tasks = [vars(t) for t in list_tasks(detail=True, limit=10_000)]
    actors = [vars(a) for a in list_actors(detail=True, limit=10_000)]
    return tasks, actors
