"""Shared fixtures: a cache of facts of its own for the test run, a tiny model on disk, the real data where they are."""

from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tasks, corpora and models, where they lie beside the project."""
    if not SHARED.is_dir():
        pytest.skip("the real data (../shared/data) are not on this machine")
    return SHARED
