"""The study file's JSON Schema, for editors."""

from typing import Any

from portllm.study.spec import Study


def json_schema() -> dict[str, Any]:
    """JSON Schema of a study file, for editors."""
    schema: dict[str, Any] = _as_written(Study.model_json_schema())
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "portllm study"
    return schema


_WRITTEN = {"integer": r"^[-+]?[0-9][0-9_]*$", "number": r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?$"}
"""Numbers that this tool reads and an editor's YAML takes for text: `500_000` (YAML 1.2), `5e-4` (YAML 1.1)."""


def _as_written(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_as_written(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: _as_written(value) for key, value in schema.items()}
    kind = inner.get("type")
    if not isinstance(kind, str) or kind not in _WRITTEN:
        return inner
    outer = {key: inner.pop(key) for key in ("title", "default", "description") if key in inner}
    return {"anyOf": [inner, {"type": "string", "pattern": _WRITTEN[kind]}], **outer}
