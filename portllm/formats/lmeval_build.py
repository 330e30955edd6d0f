"""An lm-eval task object, over local parquet files or a hub data set.

Built as `lm_eval.simple_evaluate` builds it, but without its task manager, and local parquet is read into memory:
`datasets.load_dataset` would copy the rows into a cache under the home directory, and iterating a `Dataset` costs 25 µs
a row (1.7 s for the 67,000 rows of SST-2, which lm-eval lists for few-shot sampling alone), an Arrow table's own 0.6.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.errors import PortllmError, ResolveError
from portllm.formats.lmeval_data import brings_data, local_data
from portllm.formats.lmeval_groups import expand
from portllm.formats.lmeval_index import locate, merged_config

FEWSHOT_SEED = 1234
"""`simple_evaluate`'s default: few-shot examples are lm-eval's own."""

Task = Any
"""lm_eval.api.task.ConfigurableTask; a name of its own because importing it costs 0.8 s."""


@dataclass(frozen=True)
class TaskSource:
    """A task and where its data come from."""

    name: str
    definition: Path | None = None
    """Directory of the user's YAML; None for a task built into lm-eval."""
    data: Path | None = None
    """Directory with train.parquet and validation.parquet; None for a hub's data set."""
    dataset: str | None = None
    """Hub data set instead of the task's own: path, and after a colon the subset."""
    revision: str | None = None
    num_fewshot: int | None = None
    """None is the task's own default."""


class FirstDocument(ResolveError):
    """lm-eval reads a task's first document while it makes the task, and could not read this one's."""

    def __init__(self, message: str, task: Task) -> None:
        super().__init__(message)
        self.task = task
        """Made but for that."""


def build(source: TaskSource) -> Task:
    """The lm-eval task over its data, few-shot count and seed set as `simple_evaluate` sets them.

    With `data`, train.parquet serves the training split and validation.parquet whichever split is evaluated.
    Raises ResolveError: unknown task, group, unreadable data, a column the templates miss, a hub out of reach.
    """
    path = locate(source.name, source.definition)
    written = merged_config(path)
    if "group" in written and "class" not in written:
        names = expand(source.name, source.definition)
        raise ResolveError(f"`{source.name}` is a group: name its tasks: {', '.join(names[:12])}"
                           f"{', …' if len(names) > 12 else ''}")  # fmt: skip
    _refuse(written, source)
    if source.data is None and not source.dataset and not {"class", "custom_dataset"} & written.keys():
        deque(local_data({"task": source.name, **written}), maxlen=0)  # raises for data that are not there
    with quiet():
        try:
            task = _construct(_config(path, source), source)
        except PortllmError:
            raise
        except Exception as error:
            raise ResolveError(_why(source, error)) from error
    _check_columns(task, source, trusted=source.data is None and not (source.dataset or _is_own(path, source)))
    _set_fewshot(task, source.num_fewshot)
    return task


def data_directory(root: Path, task: str, definition: Path | None) -> Path | None:
    """A task's directory below a data root; None for a task that has none there and brings its data itself.

    Raises ResolveError for any other without one: a hub's data must not stand in for what was to be found here.
    """
    if (root / task).is_dir():
        return root / task
    if brings_data(merged_config(locate(task, definition))):
        return None
    raise ResolveError(f"data_root: {root} has no directory `{task}` with train.parquet and validation.parquet")


def _config(path: Path, source: TaskSource) -> dict[str, Any]:
    """The task's configuration, its data replaced by what `source` names."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(path)
    metadata = config.get("metadata") or {}
    config["metadata"] = metadata if isinstance(metadata, dict) else {"_metadata": metadata}
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    if source.data is not None:
        splits = local_splits(config, source.data, source.name)
        config |= {"custom_dataset": lambda **_: splits, "dataset_kwargs": None}
    elif source.dataset:
        config["dataset_path"], _, subset = source.dataset.partition(":")
        config["dataset_name"] = subset or None
    if source.data is None and source.revision:
        config["dataset_kwargs"] = {**(config.get("dataset_kwargs") or {}), "revision": source.revision}
    return config


def _refuse(config: dict[str, Any], source: TaskSource) -> None:
    if config.get("unsafe_code"):
        raise ResolveError(f"task `{source.name}` runs the code a model writes: it is not supported")
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise ResolveError(f"task `{source.name}` needs images or sound: only text is supported")
    if "class" in config and source.data is not None:
        raise ResolveError(f"task `{source.name}` is a Python class that fetches its own data: it cannot have others")


def _construct(config: dict[str, Any], source: TaskSource) -> Task:
    """As lm-eval's TaskFactory does. Raises FirstDocument, and whatever else lm-eval raises."""
    from datasets import disable_progress_bars
    from lm_eval.api.task import ConfigurableTask

    _keep_templates()
    if not sys.stderr.isatty():
        disable_progress_bars()
    cls = config.get("class")
    if cls is None:
        task = ConfigurableTask.__new__(ConfigurableTask)
        try:
            ConfigurableTask.__init__(task, config=config)
        except Exception as error:
            if hasattr(task, "multiple_input"):  # set right before the document is read
                raise FirstDocument(_why(source, error), task) from error
            raise
        return task
    task = cls(config=config) if "config" in inspect.signature(cls.__init__).parameters else cls()
    task.set_config("task", config["task"])
    return task


@functools.cache
def _keep_templates() -> None:
    """lm-eval compiles a prompt's template anew for every document: 0.46 ms each, 0.018 ms when it is kept."""
    from lm_eval import utils

    utils.env.from_string = functools.lru_cache(maxsize=512)(utils.env.from_string)


def _is_own(path: Path, source: TaskSource) -> bool:
    """Whether a definition is the user's, not lm-eval's."""
    return source.definition is not None and path.is_relative_to(source.definition)


def _check_columns(task: Task, source: TaskSource, trusted: bool) -> None:
    """A bare name that is no column is rendered as itself, silently, by lm-eval.

    Where definition and data are lm-eval's own (`trusted`), a target is meant so.
    """
    for what in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        spec = getattr(task.config, what)
        bare = isinstance(spec, str) and re.fullmatch(r"[A-Za-z_]\w*", spec)
        if bare and spec not in task.features and not (what == "doc_to_target" and (trusted or _is_choice(task, spec))):
            raise ResolveError(f"task `{source.name}`: {file_of(source, False)} has no column `{spec}`, which {what} "
                               f"reads; it has {', '.join(task.features)} (if the word itself is meant, write "
                               f"{{{{'{spec}'}}}})")  # fmt: skip


def _is_choice(task: Task, word: str) -> bool:
    """Whether a bare target is meant as it stands."""
    return task.config.doc_to_choice is not None and word in task.doc_to_choice(task.task_docs[0])


def _set_fewshot(task: Task, num_fewshot: int | None) -> None:
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:  # a task that says 0 means it
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval warns about every default a task relies on; its errors stay."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _why(source: TaskSource, error: Exception) -> str:
    name = f"task `{source.name}`"
    undefined = re.match(r"'([^']+)' is undefined", str(error))
    if undefined:
        return f"{name}: {file_of(source, False)} has no column `{undefined[1]}`, which its templates read"
    if isinstance(error, KeyError) and "Unknown filter" in str(error):
        return f"{name}: {str(error.args[0]).splitlines()[0]}, which its filter_list names"
    if isinstance(error, KeyError):
        return f"{name}: {file_of(source, False)} has no column or split {error}, which the task reads"
    if source.data is None and (isinstance(error, OSError) or "Hub" in str(error)):
        return (f"{name}: its data set cannot be read from the hub ({type(error).__name__}: {error}); go online, or "
                f"put train.parquet and validation.parquet under data_root/{source.name}")  # fmt: skip
    if isinstance(error, IndexError):  # lm-eval looks the first document's label up among the choices
        return f"{name}: {file_of(source, False)}, document 0: its label is none of the choices, or a choice is empty"
    return f"{name} cannot be built: {type(error).__name__}: {error}"


def file_of(source: TaskSource, training: bool) -> str:
    if source.data is None:
        return f"the {'training' if training else 'evaluated'} split"
    return str(source.data / ("train.parquet" if training else "validation.parquet"))


def local_splits(config: Mapping[str, Any], data: Path, task: str) -> dict[str, Any]:
    """Data sets under the names of a task's splits: validation.parquet for the split it evaluates (its test split, else
    its validation split); train.parquet for every other, unless the directory holds a file of the split's own name.

    Without train.parquet the other splits are empty. Raises ResolveError where the evaluated one is missing or empty.
    """
    evaluated = config.get("test_split") or config.get("validation_split")
    if not evaluated:
        raise ResolveError(f"task `{task}` names neither a test nor a validation split: there is nothing to evaluate")
    validation = _read(data / "validation.parquet", task)
    if not validation.num_rows:
        raise ResolveError(f"task `{task}`: {data / 'validation.parquet'} holds no rows")
    fewshot = config.get("fewshot_config") or {}
    own = [config.get(key) for key in ("training_split", "validation_split", "test_split", "fewshot_split")]
    splits = {split: _other(data, split, validation, task) for split in (*own, fewshot.get("split")) if split}
    return {split: _dataset(table) for split, table in (splits | {evaluated: validation}).items()}


def _other(data: Path, split: str, like: Any, task: str) -> Any:
    for file in (data / f"{split}.parquet", data / "train.parquet"):
        if file.is_file() and file.name != "validation.parquet":
            return _read(file, task)
    return like.slice(0, 0)


def _read(file: Path, task: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(file)
    except FileNotFoundError:
        raise ResolveError(f"task `{task}`: there is no {file}") from None
    except (OSError, pa.ArrowException) as error:
        raise ResolveError(f"task `{task}`: {file} cannot be read as parquet: {error}") from error


def _dataset(table: Any) -> Any:
    from datasets import Dataset
    from datasets.features.features import require_decoding

    plain = Dataset(table)
    decoded = any(require_decoding(feature) for feature in plain.features.values())
    return plain if decoded else _rows_class()(table)


@functools.cache
def _rows_class() -> Any:
    from datasets import Dataset

    class Rows(Dataset):
        """A `Dataset` whose plain iteration yields an Arrow table's rows directly; all else is inherited."""

        def __iter__(self) -> Any:
            if self._indices is not None or self._format_type is not None:
                yield from super().__iter__()
                return
            for batch in self._data.table.to_batches(max_chunksize=8192):
                yield from batch.to_pylist()

    return Rows
