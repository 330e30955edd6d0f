"""Where weights come from: `provenance.json` beside everything this tool writes, and a patch's model card.

Sources are named by content (sha256), since a directory's name means nothing on another machine. A patch's files carry
their sha256, so that `verify` notices a flipped bit.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import portllm
from portllm.errors import ResolveError
from portllm.formats.adapter import read_adapter
from portllm.formats.tensors import PROVENANCE, content_digest, content_files, read_json, sha256
from portllm.work.changes import Patches
from portllm.work.source import Terms

LIBRARIES = ("torch", "transformers", "peft", "deepspeed")
CARD = "README.md"
Facts = dict[str, Any]


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """A JSON object, indented, in UTF-8."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def libraries() -> dict[str, str]:
    """Versions of what computes."""
    return {name: version(name) for name in LIBRARIES}


def origin(directory: Path) -> Facts:
    """An adapter's digest, what it says it was trained on, and its own provenance where it has one."""
    base = read_adapter(directory).base
    named = Path(base).name if base and Path(base).is_absolute() else base  # a hub id, or the end of a path
    return {"content": content_digest(directory), "base": named, "provenance": provenance(directory)}


def provenance(directory: Path) -> Facts | None:
    """What lies beside weights, or None."""
    file = directory / PROVENANCE
    return read_json(file) if file.is_file() else None


def of_model(model: Path, patches: Patches, dtype: str | None, terms: Terms) -> Facts:
    """Of a model with patches added. The model's weights are not hashed: that would take longer than writing them."""
    return {
        "portllm": portllm.__version__,
        "model": {"name": model.resolve().name, "provenance": provenance(model)},
        "deltas": [origin(path) for path in terms.deltas],
        "patches": [origin(path) | {"scale": scale} for path, scale in patches],
        "blend": asdict(terms.blend) if terms.blend else None,
        "untied": terms.untie,
        "dtype": dtype,
        "created": now(),
    }


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def licence(model: Path) -> str | None:
    """What a model directory says of its licence: `license` of its card, else the first line of its LICENSE."""
    if (card := model / CARD).is_file():
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:40]:
            if line.startswith("license:"):
                return line.removeprefix("license:").strip().strip("\"'") or None
    for file in sorted(model.glob("LICENSE*")):
        return next((line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()), None)
    return None


def seal_patch(out: Path, facts: Mapping[str, Any]) -> None:
    """Writes a patch's card and its provenance, which holds the sha256 of the card and of the adapter's own files.

    Other ranks may still be writing their logs beside them.
    """
    facts = {"portllm": portllm.__version__, **facts, "libraries": libraries(), "created": now()}
    (out / CARD).write_text(card(facts), encoding="utf-8")
    files = {file.name: sha256(file) for file in (*content_files(out), out / CARD)}
    write_json(out / PROVENANCE, facts | {"files": files})


def altered(patch: Path) -> list[str]:
    """Files of a patch that are missing, or differ from the sha256 in its provenance."""
    files = (provenance(patch) or {}).get("files")
    if not isinstance(files, dict) or not files:
        raise ResolveError(f"{patch}: no {PROVENANCE} with the sha256 of its files: it is no patch that portllm wrote "
                           "(a model's weights are not hashed)")  # fmt: skip
    return [name for name, digest in sorted(files.items()) if not _intact(patch / Path(name).name, digest)]


def _intact(file: Path, digest: str) -> bool:
    return file.is_file() and sha256(file) == digest


def card(facts: Mapping[str, Any]) -> str:
    """A model card as the hub reads them: a front matter, and what the patch is in a few lines."""
    licensed = f"license: {json.dumps(facts['licence'], ensure_ascii=False)}\n" if facts.get("licence") else ""
    lines = "\n".join(f"- {name}: {value}" for name, value in _lines(facts) if value is not None)
    return (
        f"---\nlibrary_name: peft\ntags: [lora, portllm]\n{licensed}---\n\n"
        f"# LoRA patch\n\nA PEFT adapter written by portllm; `{PROVENANCE}` says what made it.\n\n{lines}\n"
    )


def _lines(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    data, source, recipe = (facts.get(name) or {} for name in ("data", "source", "recipe"))
    lora = recipe.get("lora") or {}
    return [
        ("task", data.get("task")),
        ("training examples", data.get("examples")),
        ("trained on the version with sha256", source.get("sha256")),
        ("updates before that version", len(source["lineage"]) if "lineage" in source else None),
        ("rank", lora.get("rank") or facts.get("rank")),
        ("alpha", lora.get("alpha")),
        ("patches combined", len(facts.get("combined") or []) or None),
    ]
