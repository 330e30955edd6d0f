"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator

import ray

from portllm.engine.pool import Budget, Size
from portllm.errors import EngineError

_OBJECT_STORE = 128 * 1024**2
"""Bytes; weights never travel through Ray's object store, only plans and outcomes do."""


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Budget]:
    """Connect (`address`, else RAY_ADDRESS, else a new local Ray), yield the cluster's budget, disconnect."""
    started = _connect(address or os.environ.get("RAY_ADDRESS") or None)
    try:
        yield Budget(nodes())
    finally:
        if started:
            ray.shutdown()


def _connect(address: str | None) -> bool:
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address:
        _require_answer(address)
    options = (
        {"address": address}
        if address
        else {
            "address": "local",
            "num_cpus": len(os.sched_getaffinity(0)),
            "object_store_memory": _OBJECT_STORE,
            "include_dashboard": False,
        }
    )
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, namespace="portllm", **options)
    except Exception as error:  # Ray raises bare ones, for a node that did not start in time
        where = f"at {address}" if address else "on this machine"
        raise EngineError(f"no Ray {where}: {str(error).splitlines()[0]}") from error
    return True


def _require_answer(address: str) -> None:
    """Ray retries an address where nobody listens for minutes, with warnings only."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", "local": Ray's own words
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise EngineError(f"no Ray at {address}: {error.strerror or error}; is the cluster up?") from None


def nodes() -> dict[str, Size]:
    """Node id to capacity of every node that is alive."""
    return {
        node["NodeID"]: Size(int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()
        if node["Alive"]
    }
