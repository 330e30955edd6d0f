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


def spawned(address, *arguments):
    """`portllm` against a cluster, in a process of its own."""
    words = [sys.executable, "-m", "portllm", *map(str, arguments)]
    env = os.environ | {"RAY_ADDRESS": address}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def run(address, *arguments, code=0):
    """The same to its end; returns standard output."""
    with spawned(address, *arguments) as process:
        try:
            output, error = process.communicate(timeout=420)
        finally:
            process.kill()
    assert process.returncode == code, f"{output[-2000:]}\n{error[-6000:]}"
    return output


def events(address):
    """Ray's own events: tasks and actors, as the state API tells them."""
    import ray
    from ray.util.state import list_actors, list_tasks

    ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
    tasks = [vars(t) for t in list_tasks(detail=True, limit=10_000)]
    actors = [vars(a) for a in list_actors(detail=True, limit=10_000)]
    return tasks, actors
