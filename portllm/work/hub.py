"""Models from the hub: a repository's snapshot at one revision, safetensors only. The only place that asks the hub for
weights."""

import os
import re
from pathlib import Path
from typing import Any

from portllm.errors import ResolveError

FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*"]
REPOSITORY = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
"""`owner/name`, and after an @ a branch, tag or commit."""


def snapshot(repository: str, revision: str | None = None, out: Path | None = None) -> Path:
    """The directory of a repository's model: `out`, or the hub's own cache. Raises `ResolveError` with the mend."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # consolidated*: a second copy of the weights in another naming, as Mistral publishes them.
    files: dict[str, Any] = {"allow_patterns": FILES, "ignore_patterns": ["consolidated*", "*/*"]}
    try:
        found = Path(snapshot_download(repository, revision=revision, local_dir=out, **files))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ResolveError(
            f"`{repository}` at {revision or 'its main branch'} cannot be fetched: {reason} Check the network, "
            "HF_TOKEN for a gated model, and HF_HUB_OFFLINE; or fetch it elsewhere and give its directory"
        ) from error
    if not any(found.glob("*.safetensors")):
        raise ResolveError(f"`{repository}` holds no safetensors weights: take a repository that does")
    return found


def model_directory(given: str) -> Path:
    """A directory as it is; `owner/name` or `owner/name@revision`, where no such directory is, from the hub."""
    match = REPOSITORY.fullmatch(given)
    if os.path.exists(given) or match is None:
        return Path(given)
    return snapshot(match["id"], match["revision"])
