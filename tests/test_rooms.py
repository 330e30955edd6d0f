"""Rooms: what each may import, shown by importing every module of it in a fresh process."""

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "portllm"
HEAVY = {"torch", "ray", "transformers", "peft", "deepspeed", "mlflow", "datasets", "lm_eval"}
ALLOWED = {
    "study": {"study", "errors"},
    "formats": {"formats", "study", "errors"},
    "store": {"store", "study", "errors"},
    "resolve": {"resolve", "formats", "store", "study", "errors"},
    "work": {"work", "formats", "study", "errors"},
    "track": {"track", "store", "study", "errors"},
    "report": {"report", "store", "study", "errors"},
    "engine": {"engine", "work", "store", "track", "study", "errors", "formats"},
}
"""Room to the rooms that it may import."""
LOADS = {
    "study": set(),
    "formats": set(),
    "store": set(),
    "resolve": set(),
    "work": {"torch", "transformers", "peft"},
    "track": set(),
    "report": set(),
    "engine": {"ray"},
}
"""Room to the heavy libraries that importing all of its modules may load (torch brings none of the others)."""
EITHER = {"engine": {"torch", "transformers", "peft"}}


def modules(room):
    return [f"portllm.{room}.{p.stem}" for p in sorted((PACKAGE / room).glob("*.py")) if p.stem != "__init__"]


def loaded(names):
    script = f"import sys, importlib\nfor m in {names!r}: importlib.import_module(m)\nprint(' '.join(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_what_it_may(room):
    found = loaded(modules(room))
    rooms = {m.split(".")[1] for m in found if m.startswith("portllm.") and m.count(".") >= 1}
    assert rooms <= ALLOWED[room]
    assert found & HEAVY <= LOADS[room] | EITHER.get(room, set())


def test_every_folder_is_a_room():
    assert {p.parent.name for p in PACKAGE.glob("*/__init__.py")} == set(ALLOWED)


def test_work_knows_neither_store_nor_ray_nor_mlflow_by_source():
    for file in (PACKAGE / "work").glob("*.py"):
        text = file.read_text()
        for name in ("portllm.store", "portllm.engine", "portllm.track", "import ray", "from ray", "import mlflow"):
            assert name not in text, f"{file.name} names {name}"


@pytest.mark.parametrize("arguments", [["--help"], ["schema"], ["plan", "--help"]])
def test_light_commands_load_nothing_heavy(arguments):
    script = (
        f"import sys\nfrom portllm.cli import main\ntry: main({arguments!r})\n"
        "finally: print('LOADED', ' '.join(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0
    assert not set(found.stdout.rsplit("LOADED", 1)[1].split()) & (HEAVY | {"pyarrow", "numpy"})
