"""The local files that a task's definition reads as data, found where `datasets.load_dataset` finds them.

A loader (`parquet`, `json`, …) starts at `data_dir`, else at the working directory; a local directory as `dataset_path`
starts at itself and its `data_dir`. lm-eval adds nothing to that: the directory of the YAML plays no part. What lies at
the hub or behind a URL is nobody's file here. Rather a file too many than one too few: a file that is read and not
in a key gives the scores of other data under that key. Nothing here imports datasets.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from portllm.errors import ResolveError

LOADERS = {
    "csv", "json", "pandas", "parquet", "arrow", "text", "conll", "imagefolder", "audiofolder", "videofolder",
    "meshfolder", "pdffolder", "niftifolder", "webdataset", "xml", "hdf5", "eval", "lance", "tsfile", "iceberg",
    "vortex", "mmcif", "pdb", "genbank", "fasta", "fastq", "harbor",
}  # fmt: skip
"""Names that `datasets` 5.2 takes for a file format, never for a data set of the hub."""
_CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")
"""What says more of a local directory: its configurations, its features."""


def from_hub(config: Mapping[str, Any]) -> bool:
    """Whether a task's `dataset_path` names a data set of the hub."""
    path = str(config.get("dataset_path") or "")
    return bool(path) and not config.get("custom_dataset") and path not in LOADERS and not _is_local(path)


def brings_data(config: Mapping[str, Any]) -> bool:
    """Whether a definition names its data itself, and no hub: local files, a function, or a class that fetches them."""
    if config.get("class") or config.get("custom_dataset"):
        return True
    path, kwargs = str(config.get("dataset_path") or ""), config.get("dataset_kwargs")
    named = isinstance(kwargs, dict) and (kwargs.get("data_files") or kwargs.get("data_dir"))
    return bool(path) and not from_hub(config) and bool(named or path not in LOADERS)


def local_data(config: Mapping[str, Any]) -> Iterator[Path]:
    """The files that a merged definition reads, and the directories in which one added later would be read, too.

    Raises ResolveError naming task and path where a local path does not exist.
    """
    kwargs = config.get("dataset_kwargs")
    kwargs = kwargs if isinstance(kwargs, dict) else {}
    if config.get("custom_dataset"):
        yield from _told(kwargs, config.get("metadata"))
    elif config.get("dataset_path"):
        yield from _loaded(config, list(_patterns(kwargs.get("data_files"))), str(kwargs.get("data_dir") or ""))


def _loaded(config: Mapping[str, Any], patterns: list[str], data_dir: str) -> Iterator[Path]:
    """What `load_dataset` reads."""
    path, task = str(config["dataset_path"]), f"task `{config.get('task')}`"
    start = None if from_hub(config) else _start(task, path, data_dir)
    if start and not patterns:
        if path in LOADERS and not data_dir:  # `datasets` would take every file of the working directory
            raise ResolveError(
                f"{task}: dataset_path `{path}` reads files and the definition names none: add dataset_kwargs with "
                f"data_files, or say where they lie (data_root, --data-root)"
            )
        patterns = ["**"]
    if start and path not in LOADERS:
        yield Path(path)
        yield from (card for name in _CARDS if (card := Path(path, name)).is_file())
    for pattern in patterns:
        if (where := _local(pattern, start)) is not None:
            yield from _matches(task, where)


def _start(task: str, path: str, data_dir: str) -> Path:
    root = "" if path in LOADERS else path
    if root and not os.path.isdir(root):
        raise ResolveError(f"{task}: dataset_path {path} is not a directory: `datasets` reads local data from one, or "
                           f"through a loader such as `parquet` with data_files")  # fmt: skip
    start = Path(root, data_dir).expanduser().resolve()
    if not start.is_dir():
        raise ResolveError(f"{task}: dataset_kwargs.data_dir: {start} is not a directory")
    return start


def _is_local(path: str) -> bool:
    """Hub names have at most one slash; a directory of that name in the working directory comes before the hub."""
    if "://" in path or path.startswith("buckets/"):
        return False
    return path.startswith((".", "/")) or path.count("/") > 1 or path.endswith(".py") or os.path.isdir(path)


def _patterns(data_files: Any) -> Iterator[str]:
    """Paths, patterns and URLs of `data_files`: one, a list, by split, or a list of {split, path}."""
    for value in data_files.values() if isinstance(data_files, dict) else as_list(data_files):
        yield from map(str, as_list(value.get("path") if isinstance(value, dict) else value))


def _local(pattern: str, start: Path | None) -> str | None:
    """A pattern as an absolute path; None for a URL, and for a path inside a hub's data set (no `start`)."""
    file = pattern.rpartition("::")[2].removeprefix("file://")  # zip://*.csv::/data/all.zip reads the archive
    if "://" in file or os.path.isabs(file):
        return None if "://" in file else file
    if file != pattern:
        return os.path.abspath(file)
    return None if start is None else str(start / file)


def _matches(task: str, pattern: str) -> Iterator[Path]:
    found = [Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if _asked_for(path, pattern)]
    if not any(path.is_file() for path in found):
        why = "matches no file" if glob.has_magic(pattern) else "is not a file" if found else "does not exist"
        raise ResolveError(f"{task}: its data {pattern} {why}; mend dataset_kwargs or dataset_path in its definition")
    yield from found
    if glob.has_magic(pattern):
        yield from _parents(pattern)


def _asked_for(path: str, pattern: str) -> bool:
    """`datasets` leaves out what lies in `__pycache__` and the like, unless the pattern says so."""
    return _special(path) == _special(pattern)


def _special(path: str) -> int:
    return sum(part.startswith("__") for part in path.split(os.sep))


def _parents(pattern: str) -> Iterator[Path]:
    """The directories in which a pattern was looked for."""
    for parent in map(str, Path(pattern).parents):
        yield from (Path(p) for p in glob.glob(parent, recursive=True) if os.path.isdir(p))
        if not glob.has_magic(parent):
            return


def _told(*values: Any) -> Iterator[Path]:
    """Files and directories among what a function that makes the data set is told; it alone knows what it reads."""
    for value in values:
        if isinstance(value, (dict, list)):
            yield from _told(*(value.values() if isinstance(value, dict) else value))
        elif isinstance(value, str) and os.sep in value and value.strip("./") and os.path.exists(value):
            yield Path(value)
            below = glob.escape(value) + "/**"
            yield from (Path(p) for p in glob.glob(below, recursive=True) if _asked_for(p, value))


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
