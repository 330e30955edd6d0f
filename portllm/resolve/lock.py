"""Hub ids pinned to commits: `STUDY.lock.json` beside the study, written by `portllm lock`.

A name such as `main` moves; a key made from it would lie. So a plan needs full commit shas: from the study's own
`revision`, or from the lock.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from portllm.errors import ResolveError
from portllm.resolve.models import pinned
from portllm.study.spec import Study


def lock_path(study_file: Path) -> Path:
    """The lock beside a study file, wherever links to it lie."""
    return study_file.resolve().with_suffix(".lock.json")


def read_lock(study_file: Path) -> dict[str, str]:
    """Pins by `model:ID`, `dataset:ID`, or either with `@TAG`; empty where there is no lock."""
    path = lock_path(study_file)
    if not path.is_file():
        return {}
    try:
        pins = {str(k): str(v) for k, v in json.loads(path.read_bytes())["pins"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ResolveError(f"{path}: not a lock; remove it, and write it anew with `portllm lock`") from None
    bad = [k for k, v in pins.items() if not pinned(v)]
    if bad:
        raise ResolveError(f"{path}: {bad[0]}: not a full commit sha; remove the lock, and run `portllm lock`")
    return pins


def hub_ids(study: Study, datasets: Mapping[str, str | None]) -> list[str]:
    """Everything of a study that comes from the hub, unless the study itself pins it: `model:ID` or `dataset:ID`, with
    `@TAG` where the study names a tag or branch.

    `datasets`: task to its hub data set (`path:subset`), None where data are given.
    """
    updates = [update for line in study.lineages.values() for update in line.updates]
    named: list[tuple[str, Any]] = [("model", value) for value in (*study.models.values(), *updates)]
    named += [("dataset", corpus) for corpus in study.corpora.values()]
    ids = [_id(kind, value) for kind, value in named if value.hub and not pinned(value.revision)]
    ids += [f"dataset:{d.partition(':')[0]}" for d in datasets.values() if d]
    return list(dict.fromkeys(ids))


def _id(kind: str, value: Any) -> str:
    return f"{kind}:{value.hub}{f'@{value.revision}' if value.revision else ''}"


def apply_lock(study: Study, pins: Mapping[str, str]) -> Study:
    """The study with its hub ids pinned where the lock knows them."""

    def pin(kind: str, value: Any) -> Any:
        if not value.hub or pinned(value.revision):
            return value
        return value.model_copy(update={"revision": pins.get(_id(kind, value), value.revision)})

    lineages = {
        name: line.model_copy(update={"updates": [pin("model", u) for u in line.updates]})
        for name, line in study.lineages.items()
    }
    return study.model_copy(
        update={
            "models": {n: pin("model", m) for n, m in study.models.items()},
            "corpora": {n: pin("dataset", c) for n, c in study.corpora.items()},
            "lineages": lineages,
        }
    )


def write_lock(study_file: Path, ids: list[str]) -> Path:
    """Ask the hub for the commit of every id and write the lock; ResolveError offline, nothing written."""
    from portllm.store.store import write_json

    pins = read_lock(study_file) | {name: _commit(name) for name in ids}
    path = lock_path(study_file)
    write_json(path, {"pins": pins})
    return path


def _commit(name: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    kind, _, at = name.partition(":")
    repository, _, revision = at.partition("@")
    try:
        info = HfApi().repo_info(repository, revision=revision or None, repo_type=kind, timeout=20)
    except OfflineModeIsEnabled:
        raise ResolveError(f"{at}: the hub is switched off (HF_HUB_OFFLINE); `lock` needs it") from None
    except HfHubHTTPError as error:
        raise ResolveError(f"{at}: the hub refused: {str(error).splitlines()[0]}") from None
    except Exception as error:  # connection errors of whichever HTTP library the hub client uses
        raise ResolveError(f"{at}: the hub is out of reach ({type(error).__name__}); `lock` needs it") from None
    return str(info.sha)
