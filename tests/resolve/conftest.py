"""A study on a toy world."""

import shutil

import pytest

from tests.toys import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world") / "w")


@pytest.fixture
def copy(world, tmp_path):
    """A world of one's own to break."""
    shutil.copytree(world.parent, tmp_path / "w")
    return tmp_path / "w" / "study.yaml"
