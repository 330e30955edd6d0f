"""What stands behind the name of a task, tag or group of lm-eval, and how a group joins its members' scores.

Nothing here imports lm_eval.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from portllm.errors import ResolveError
from portllm.formats.lmeval_data import as_list
from portllm.formats.lmeval_index import indexes, locate, merged_config

_KEYS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"}


@dataclass(frozen=True)
class Joining:
    """A metric of a group: the mean over its tasks, which is all that lm-eval computes whatever `aggregation` says."""

    metric: str
    filters: tuple[str, ...] | None
    """None: every filter that the tasks have."""
    by_size: bool
    """Whether a task counts with its documents, or as one."""


@dataclass(frozen=True)
class Group:
    """A group with a score of its own."""

    name: str
    tasks: tuple[str, ...]
    joinings: tuple[Joining, ...]


@dataclass(frozen=True)
class Members:
    """What stands behind a name."""

    tasks: tuple[str, ...]
    """As lm-eval orders them, each once."""
    groups: tuple[Group, ...] = ()
    """Those with a score of their own, outer ones first."""


def expand(name: str, include_path: Path | None = None) -> list[str]:
    """The tasks behind a task, group or tag name, as lm-eval orders them."""
    return list(members(name, include_path).tasks)


def members(name: str, include_path: Path | None = None, within: tuple[str, ...] = ()) -> Members:
    """The tasks and the groups behind a task, group or tag name, which the groups `within` name in turn.

    Raises ResolveError for an unknown name, for a group that is empty or its own member, and for one that changes its
    members (their few-shot count, say): a name alone cannot carry that.
    """
    if name in within:
        raise ResolveError(f"group `{name}` is a member of itself: {' > '.join((*within, name))}")
    for _, index in indexes(name, include_path):
        if name in index.tasks:
            return Members((name,))
        if name in index.tags and name not in index.groups:
            return Members(tuple(sorted(index.tags[name])))
    return _group(name, merged_config(locate(name, include_path)), include_path, within)


def _group(name: str, config: dict[str, Any], include_path: Path | None, within: tuple[str, ...]) -> Members:
    if changed := sorted(set(config) - _KEYS):
        raise ResolveError(_changes(name, ", ".join(changed)))
    inside = [_member((*within, name), member, include_path) for member in as_list(config.get("task"))]
    tasks = tuple(dict.fromkeys(chain.from_iterable(found.tasks for found in inside)))
    if not tasks:
        raise ResolveError(f"group `{name}` has no tasks")
    joinings = tuple(_joining(name, entry) for entry in as_list(config.get("aggregate_metric_list")))
    own = [Group(name, tasks, joinings)] if joinings else []
    return Members(tasks, tuple(dict.fromkeys(chain(own, *(found.groups for found in inside)))))


def _member(within: tuple[str, ...], member: Any, include_path: Path | None) -> Members:
    if isinstance(member, str):
        return members(member, include_path, within)
    if isinstance(member, dict) and "group" in member and set(member) <= _KEYS:
        return _inner(within, member, include_path)
    if isinstance(member, dict) and "task" in member and set(member) <= {"task", "task_alias"}:
        return members(member["task"], include_path, within)
    raise ResolveError(_changes(within[-1], str(member)[:80]))


def _inner(within: tuple[str, ...], member: dict[str, Any], include_path: Path | None) -> Members:
    """A group that another names, or defines; that one's name then begins with the other's, as in lm-eval."""
    if set(member) == {"group"}:
        return members(member["group"], include_path, within)
    return _group(f"{within[-1]}::{member['group']}", member, include_path, within)


def _joining(group: str, entry: Any) -> Joining:
    if not isinstance(entry, dict) or not isinstance(entry.get("metric"), str):
        raise ResolveError(f"group `{group}`: aggregate_metric_list: `{str(entry)[:80]}` names no metric")
    filters = entry.get("filter_list")
    return Joining(entry["metric"], tuple(as_list(filters)) or None, bool(entry.get("weight_by_size", True)))


def _changes(group: str, what: str) -> str:
    return (f"group `{group}` changes its members ({what}), and a name cannot carry that: name its tasks, and write "
            f"those changes into definitions of your own (include_path)")  # fmt: skip
