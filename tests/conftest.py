"""Shared fixtures: a cache of facts of its own for the test run, a tiny model on disk, the real data where they are."""

import gc
import json
from pathlib import Path

import pytest

from tests.toys import TWO_LINEAGES, portllm, write_world

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """No test reads or writes the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PORTLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.delenv("PORTLLM_STORE", raising=False)
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    patch.delenv("RAY_ADDRESS", raising=False)
    yield
    patch.undo()


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_no_garbage():
    """What is imported by now is not looked through again: a collection over half a million objects of torch, DeepSpeed
    and lm-eval takes 0.35 s, and a training asks for up to six."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tasks, corpora and models, where they lie beside the project."""
    if not SHARED.is_dir():
        pytest.skip("the real data (../shared/data) are not on this machine")
    return SHARED


@pytest.fixture(scope="module")
def one_thread():
    """torch computes in one thread: sums in another order have other last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A toy study of two lineages after one undisturbed run: (study file, store, the run's report)."""
    world = write_world(tmp_path_factory.mktemp("main") / "w", TWO_LINEAGES)
    store = world.parent / "store"
    return world, store, json.loads(portllm("run", world, "--store", store, "--yes", "--json"))
