"""What commands share on a terminal."""

from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=1, default=str), flush=True)
