"""Kinds of values in a study file: what a name, a count, a rate, a seed or a LoRA target may be."""

import re
from typing import Annotated, Any, Literal, Union

from pydantic import AfterValidator, BeforeValidator, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Arm = Literal["none", "port", "warm", "refit"]
ApplyMode = Literal["merged", "adapter"]
Count = Annotated[int, Field(ge=1, le=10**15, strict=True)]
Seed = Annotated[int, Field(ge=0, strict=True)]
Length = Annotated[int, Field(ge=2, le=10**9, strict=True)]
"""Tokens of a packed sequence: every token but the first is predicted."""


def _number(value: Any) -> Any:
    """A number, and nothing that could be taken for one: neither `true` nor text."""
    if isinstance(value, (bool, str)):
        raise ValueError("input should be a number")
    return value


Rate = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_number), Field(gt=0, lt=1, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
HubId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")]


def _targets(value: Any) -> Any:
    """PEFT takes a text for a pattern of whole module names: a bare word matches nothing."""
    if value == [] or value == "":
        raise ValueError("give all-linear, or a list of module names")
    if isinstance(value, str) and value != "all-linear":
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if re.fullmatch(r"\w+", value):
            raise ValueError(f"a text is a pattern of whole module names; write [{value}]")
    return value


Targets = Annotated[str | list[Text], BeforeValidator(_targets, json_schema_input_type=str | list[str])]
"""`all-linear`, module names (the last part is enough), or a regular expression of whole names."""


def _distinct(value: list[int]) -> list[int]:
    if len(set(value)) != len(value):
        raise ValueError("a seed stands twice")
    return value


Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)]


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def one_or_more(kind: Any) -> BeforeValidator:
    """A value alone stands for a list of one."""
    return BeforeValidator(_listed, json_schema_input_type=Union[kind, list[kind]])  # noqa: UP007
