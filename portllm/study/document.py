"""The study file as a document: YAML in, plain values and their line numbers out, with overrides laid over it.

Differences from plain YAML: a key that stands twice is an error, and `5e-4` is a number (YAML 1.1 reads it as text).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from portllm.errors import SpecError

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A parsed study file."""

    name: str
    """As shown in errors: the file's path."""
    data: dict[str, Any]
    lines: Mapping[Location, int]
    """1-based line of every value; overrides have none."""

    def where(self, location: Location) -> str:
        """`file:line: field` of a value."""
        return f"{self.place(location)}: {dotted(location)}".rstrip(": ")

    def place(self, location: Location) -> str:
        """`file:line` of a value, or of its nearest parent that stands in the file."""
        sizes = range(len(location), -1, -1)
        line = next((self.lines[location[:size]] for size in sizes if location[:size] in self.lines), None)
        return self.name if line is None else f"{self.name}:{line}"

    def located(self, message: str) -> str:
        """A message that begins with a field (`models.m.path: …`) or a task (task `sst2`: …), with file and line."""
        if message.startswith(f"{self.name}:"):
            return message
        if task := re.match(r"tasks?[ .]`?([\w.-]+)`?", message):
            listed = self.data.get("tasks")
            names = [t.get("task") if isinstance(t, dict) else t for t in listed] if isinstance(listed, list) else []
            if task[1] in names:
                return f"{self.place(('tasks', names.index(task[1])))}: {message}"
        field = re.match(r"[a-z_]+(?:\.[^:\s\[.]+|\[\d+\])*", message)
        parts = re.findall(r"[^.\[\]]+|\[\d+\]", field[0]) if field else []
        if not parts or parts[0] not in self.data:
            return f"{self.name}: {message}"
        location = tuple(int(p[1:-1]) if p.startswith("[") else p for p in parts)
        return f"{self.place(named(self.data, location))}: {message}"


def dotted(location: Location) -> str:
    """`lineages.lora.updates[0].rank` for a location."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML with floats as people write them."""


_Loader.yaml_implicit_resolvers = {
    key: [(tag, regex) for tag, regex in resolvers if tag != "tag:yaml.org,2002:float"]
    for key, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse(text: str, name: str) -> Document:
    """Parse a study file's text; raises SpecError with file and line."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            lines: dict[Location, int] = {}
            _refuse_twice(node, (), name, set())
            data = _construct(loader, node, (), lines, name) if node is not None else {}
        finally:
            loader.dispose()
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{name}: a value that cannot be read: {str(error).splitlines()[0]}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise SpecError(f"{name}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(data, dict):
        raise SpecError(f"{name}: a study file is a mapping with keys such as name, models, lineages and tasks")
    return Document(name, data, lines)


def _refuse_twice(node: Any, at: Location, name: str, seen: set[int]) -> None:
    """SpecError for a key that a mapping itself holds twice; one that it takes over with `<<` may be given anew."""
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            _refuse_twice(child, (*at, i), name, seen)
        return
    keys: set[str] = set()
    for key, value in node.value:
        word = str(key.value)
        if word in keys and key.tag != "tag:yaml.org,2002:merge":
            raise SpecError(f"{name}:{key.start_mark.line + 1}: {dotted((*at, word))} stands twice")
        keys.add(word)
        _refuse_twice(value, (*at, word), name, seen)


def _construct(loader: Any, node: Any, at: Location, lines: dict[Location, int], name: str) -> Any:
    lines[at] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            key = key if isinstance(key, str) else str(key_node.value)
            result[key] = _construct(loader, value_node, (*at, key), lines, name)
            lines[(*at, key)] = key_node.start_mark.line + 1
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, child, (*at, i), lines, name) for i, child in enumerate(node.value)]
    return loader.construct_object(node, deep=True)


def override(document: Document, assignments: Sequence[str]) -> Document:
    """Lay `a.b=c` or `a[0].b=c` assignments over a document; values are YAML."""
    data = _copy(document.data)
    lines = dict(document.lines)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator or not path.strip():
            raise SpecError(f"-o {assignment}: write field=value, for example -o finetune.rank=16")
        location = named(data, _location(path.strip(), assignment))
        _assign(data, location, _value(text, assignment), assignment)
        lines = {at: line for at, line in lines.items() if at[: len(location)] != location}
    return Document(document.name, data, lines)


def _location(path: str, assignment: str) -> Location:
    if not re.fullmatch(r"[^.\[\]]+(?:\.[^.\[\]]+|\[\d+\])*", path):
        raise SpecError(f"-o {assignment}: `{path}` is not a field such as lineages.lora.updates[0].rank")
    parts = re.findall(r"[^.\[\]]+|\[\d+\]", path)
    return tuple(int(p[1:-1]) if p.startswith("[") else p for p in parts)


def named(data: Any, location: Location) -> Location:
    """A location in which parts that are one name of the data are one: `models`, `llama-3.1-8b`, `path`."""
    found: list[str | int] = []
    rest = location
    while rest:
        sizes = range(len(rest), 1, -1) if isinstance(data, dict) else ()
        size = next((n for n in sizes if ".".join(map(str, rest[:n])) in data), 1)
        part = ".".join(map(str, rest[:size])) if size > 1 else rest[0]
        if isinstance(data, list) and isinstance(part, str) and part.isdecimal():
            part = int(part)
        found, rest = [*found, part], rest[size:]
        inside = isinstance(data, list) and isinstance(part, int) and part < len(data)
        data = data[part] if inside else data.get(str(part)) if isinstance(data, dict) else None
    return tuple(found)


def _value(text: str, assignment: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise SpecError(f"-o {assignment}: `{text}` is not a YAML value") from None


def _assign(data: Any, location: Location, value: Any, assignment: str) -> None:
    for depth, part in enumerate(location[:-1]):
        if isinstance(data, list):
            data = data[_index(data, part, location[: depth + 1], assignment)]
        elif isinstance(data, dict):
            data = data.setdefault(str(part), {})
        else:
            raise SpecError(f"-o {assignment}: {dotted(location[:depth])} is a value, not a mapping")
    last = location[-1]
    if isinstance(data, list):
        data[_index(data, last, location, assignment)] = value
    elif isinstance(data, dict):
        data[str(last)] = value
    else:
        raise SpecError(f"-o {assignment}: {dotted(location[:-1])} is a value, not a mapping")


def _index(data: list[Any], part: str | int, location: Location, assignment: str) -> int:
    if isinstance(part, int) and 0 <= part < len(data):
        return part
    raise SpecError(f"-o {assignment}: {dotted(location)}: the list has {len(data)} entries, numbered from 0")


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value
