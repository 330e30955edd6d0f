"""Where lm-eval's tasks are defined, found without lm-eval's own index (13,100 tasks parsed: 5-10 s).

The top-level keys of a task's YAML are read with one regular expression (0.4 s for the whole tree), and what was found
is kept per lm-eval version under `$PORTLLM_CACHE` (default `~/.cache/portllm`; 20 ms to read). Nothing here imports
lm_eval, datasets or torch.
"""

from __future__ import annotations

import codecs
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from portllm.errors import ResolveError
from portllm.formats.lmeval_data import as_list, local_data

# A literal newline, not ^ with re.M: half the time over 14,000 files.
_KEYS = re.compile(rb"""\n["']?(task|group|class|tag|include)["']?[ \t]*:[ \t]*(.*(?:\n[ \t]*-[ \t].*)*)""")
_PLAIN = re.compile(rb"[\w.-]+")
_IMPORT = re.compile(r"^\s*(?:from|import)\s+\.?(\w+)", re.M)
_SKIPPED = {"__pycache__", ".ipynb_checkpoints"}


@dataclass(frozen=True)
class Index:
    """Names defined under one directory."""

    tasks: dict[str, str] = field(default_factory=dict)
    """Task → YAML, relative to the directory."""
    groups: dict[str, str] = field(default_factory=dict)
    tags: dict[str, list[str]] = field(default_factory=dict)
    """Tag → tasks that carry it."""


def cache_dir() -> Path:
    """Directory for what can be computed again: `$PORTLLM_CACHE`, else `~/.cache/portllm`."""
    return Path(os.environ.get("PORTLLM_CACHE") or Path.home() / ".cache" / "portllm")


def locate(name: str, include_path: Path | None = None) -> Path:
    """The YAML that defines a task or a group; definitions under `include_path` win over lm-eval's own.

    Raises ResolveError for an unknown name (with the nearest ones) and for a tag, which has no YAML.
    """
    for root, index in indexes(name, include_path):
        found = index.tasks.get(name) or index.groups.get(name)
        if found:
            return root / found
        if name in index.tags:
            raise ResolveError(f"`{name}` is a tag: name its tasks: {', '.join(sorted(index.tags[name]))}")
    raise ResolveError(_unknown(name, include_path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def definition_digest(path: Path, *, data: bool = True, sha256: Callable[[Path], str] = _sha256) -> str:
    """sha256 over a task's YAML, what it includes, the Python its `!function` names live in, and its local data.

    `data` is False where the study gives other data; `sha256` (of a file) may come from a cache.
    """
    digest = hashlib.sha256()
    names = {file: name for name, file in _imported(path)}  # installed, it lies elsewhere on another machine
    parts = {(names.get(part) or os.path.relpath(part, path.parent), part) for part in definition_files(path, data)}
    for label, file in sorted(parts):
        if file.is_file():
            digest.update(f"{label}\0{sha256(file)}\n".encode())
    return digest.hexdigest()


def definition_files(path: Path, data: bool = True) -> Iterator[Path]:
    """Every file that says what a task is: YAML, includes, functions; with `data` its local data (`local_data`).

    Directories among them are those in which a file added later would be read as well.
    """
    for file, modules in _yamls(path):
        yield file
        for module in modules:
            if found := _beside(file, module) or _installed(module):
                yield from _modules(found, set())
    if data:
        yield from local_data(merged_config(path))


def _yamls(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """A definition and what it includes, each with the modules of its own `!function` names."""
    config, functions = read_yaml(path)
    yield path, list(dict.fromkeys(function.rpartition(".")[0] for function in functions))
    for include in as_list(config.get("include")):
        yield from _yamls(path.parent / include)


def _beside(file: Path, module: str) -> Path | None:
    found = file.parent / f"{module.replace('.', '/')}.py"
    return found if found.is_file() else None


def _imported(path: Path) -> Iterator[tuple[str, Path]]:
    """(module, its file) of the `!function` names that lie beside no YAML."""
    for file, modules in _yamls(path):
        for module in modules:
            if not _beside(file, module) and (found := _installed(module)):
                yield module, found


def _installed(module: str) -> Path | None:
    """The file of a module on Python's path; none of lm-eval's own, whose version is in every key."""
    if module.partition(".")[0] == "lm_eval":
        return None
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # looking for it runs the packages around it; building the task says what is wrong
        return None
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def _modules(path: Path, seen: set[Path]) -> Iterator[Path]:
    """A Python file and those beside it that it imports."""
    if path in seen or not path.is_file():
        return
    seen.add(path)
    yield path
    for name in _IMPORT.findall(path.read_text(encoding="utf-8")):
        yield from _modules(path.parent / f"{name}.py", seen)


def read_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A task's YAML without running anything of it, and the `!function` names it uses."""
    functions: list[str] = []

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        pass

    def function(loader: Any, node: Any) -> str:
        functions.append(str(node.value))
        return f"!function {node.value}"

    Loader.add_constructor("!function", function)
    try:
        config = yaml.load(path.read_bytes(), Loader=Loader)
    except (OSError, yaml.YAMLError) as error:
        raise ResolveError(f"task definition {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ResolveError(f"task definition {path} is not a mapping of keys to values")
    return config, functions


def merged_config(path: Path) -> dict[str, Any]:
    """A task's YAML with what it includes, its own keys winning; nothing of it is run."""
    config = read_yaml(path)[0]
    merged: dict[str, Any] = {}
    for include in as_list(config.pop("include", None)):
        merged |= merged_config(path.parent / include)
    return merged | config


def indexes(name: str, include_path: Path | None) -> Iterator[tuple[Path, Index]]:
    """The indexes a name is looked up in, nearest first; lm-eval's own only if the caller asks for it."""
    if include_path is not None:
        if not include_path.is_dir():
            raise ResolveError(f"task `{name}`: include_path {include_path} is not a directory")
        yield include_path, scan(include_path)
    yield (root := _tasks_root()), _builtin(root, name)


def _unknown(name: str, include_path: Path | None) -> str:
    names = [n for _, index in indexes(name, include_path) for n in (*index.tasks, *index.groups, *index.tags)]
    near = difflib.get_close_matches(name, names, 3)
    hint = f"did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else "`lm-eval ls tasks` lists what there is"
    return f"lm-eval knows no task `{name}`: {hint}"


def _tasks_root() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ResolveError("lm_eval is not installed: pip install lm_eval")
    return Path(spec.submodule_search_locations[0]) / "tasks"


_scanned: dict[Path, Index] = {}
"""Indexes of this process."""


def _builtin(root: Path, name: str) -> Index:
    version = importlib.metadata.version("lm_eval")
    file = cache_dir() / f"lm_eval-{version}-{hashlib.sha256(str(root).encode()).hexdigest()[:12]}.json"
    index = _scanned.get(root) or _load(file)
    if index is None or (root not in _scanned and not _holds(index, name, root)):
        index = scan(root)  # nothing kept, or kept before the tree was edited
        _save(file, index)
    _scanned[root] = index
    return index


def _holds(index: Index, name: str, root: Path) -> bool:
    file = index.tasks.get(name) or index.groups.get(name)
    return name in index.tags if file is None else (root / file).is_file()


def _load(file: Path) -> Index | None:
    try:
        return Index(**json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _save(file: Path, index: Index) -> None:
    draft = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(asdict(index)), encoding="utf-8")
        draft.replace(file)
    except OSError:
        draft.unlink(missing_ok=True)  # a read-only home: scanned again next time


def scan(root: Path) -> Index:
    """Every task, group and tag defined under a directory; of two files with one name the first in order counts."""
    index = Index()
    read = functools.cache(_keys)
    for file in _yaml_files(root):
        keys = read(file)
        own = _scalars(keys.get(b"group" if b"group" in keys and b"class" not in keys else b"task", b""))
        if len(own) != 1:
            continue
        relative = file[len(str(root)) + 1 :]
        if b"group" in keys and b"class" not in keys:
            index.groups.setdefault(own[0], relative)
        elif own[0] not in index.tasks:
            index.tasks[own[0]] = relative
            for tag in _tags(file, keys, read):
                index.tags.setdefault(tag, []).append(own[0])
    return index


def scanned(root: Path) -> Iterator[Path]:
    """What `scan` looked at below a directory: folders, YAML files, and what they include."""
    seen: set[str] = set()
    waiting = _yaml_files(root)
    while waiting:
        file = os.path.normpath(waiting.pop())
        if file not in seen and os.path.isfile(file):
            seen.add(file)
            waiting += _includes(file, _keys(file))
    yield from map(Path, sorted(seen))
    yield from (Path(directory) for directory, _ in _folders(root))


def _folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    for directory, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED]
        yield directory, files


def _yaml_files(root: Path) -> list[str]:
    return sorted(os.path.join(folder, f) for folder, files in _folders(root) for f in files if f.endswith(".yaml"))


def _keys(path: str) -> dict[bytes, bytes]:
    try:
        with open(path, "rb", buffering=0) as file:
            return dict(_KEYS.findall(b"\n" + file.read().removeprefix(codecs.BOM_UTF8)))
    except OSError:
        return {}


def _tags(path: str, keys: dict[bytes, bytes], read: Callable[[str], dict[bytes, bytes]]) -> list[str]:
    if b"tag" in keys:
        return _scalars(keys[b"tag"])
    return [tag for file in _includes(path, keys) for tag in _tags(file, read(file), read)]


def _includes(path: str, keys: dict[bytes, bytes]) -> list[str]:
    return [os.path.join(os.path.dirname(path), name) for name in _scalars(keys.get(b"include", b""))]


def _scalars(raw: bytes) -> list[str]:
    """The names in `name`, `[a, b]` or a block list, without quotes and comments."""
    if _PLAIN.fullmatch(raw):
        return [raw.decode()]
    first, *rest = (re.sub(r"(^|\s)#.*", "", line).strip() for line in raw.decode("utf-8", "replace").split("\n"))
    if first.startswith("["):
        names = first.strip("[]").split(",")
    else:
        names = [first] if first else [line.removeprefix("-") for line in rest]
    return [bare for name in names if (bare := name.strip().strip("\"'"))]
