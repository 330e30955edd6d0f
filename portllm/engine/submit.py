"""Submitting a study to a Ray cluster through its Jobs API, and following, listing and cancelling what was submitted.

Two ways for the study to reach the cluster, and nothing in between:

- upload (default): the study file, its lock file and whatever it names by a relative path below its own folder are
  copied into a package (under 100 MiB, Ray's limit). A relative path that leaves the folder is refused: it would point
  at nothing there. Absolute paths are left alone: they are the cluster's. Results need a store that outlives the job's
  temporary folder, so the store must be an absolute path on the cluster.
- shared: nothing is copied. The cluster sees this file system (a head on this machine, a network file system) and the
  job runs the study where it lies; relative paths and the default store mean what they mean here.

The job runs `python -m portllm run STUDY --yes --address auto`. A checkout of portllm (an editable install) is sent
along, so the job runs the code that submitted it; an installed portllm is expected on the cluster at the same version.

Authentication: Ray answers "Unauthorized" unless the client sends the cluster's token. It is taken from where Ray keeps
it (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token) and sent whether or not RAY_AUTH_MODE=token is set here.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import EngineError, SpecError
from portllm.formats.lmeval_build import data_directory
from portllm.formats.lmeval_groups import expand
from portllm.study.spec import Study, load

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

UPLOAD_LIMIT = 100 * 1024**2
"""Bytes; Ray refuses a larger package, after packing it."""
NEVER_UPLOADED = (
    ".git",
    ".venv",
    "venv",
    "__pycache__",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    "node_modules",
    "portllm-store",
    "*.pyc",
)
_PATH_FIELDS = ("path", "gguf", "include_path", "shape", "deepspeed")
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_POLL_S = 1.0
STOP_WAIT_S = 40
"""What Ray grants a cancelled job before it kills it: a run lets its trainings keep their state (`start.GRACE_S`), for
which Ray's own 3 s are too few."""
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@dataclass(frozen=True)
class Job:
    """A submitted job as the cluster knows it."""

    id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    study: str
    """Name of the study; empty for a job that portllm did not submit."""
    started: float | None
    """Seconds since the epoch."""
    ended: float | None
    message: str

    @property
    def wall_s(self) -> float | None:
        """Seconds from start to end, or until now."""
        return None if self.started is None else (self.ended or time.time()) - self.started


@dataclass(frozen=True)
class Package:
    """What a job is given."""

    study: str
    """The study file as the job names it: absolute when shared, relative to the package when uploaded."""
    store: str
    files: tuple[Path, ...]
    """Files to upload; none when shared."""
    base: Path
    """Directory the files keep their places under."""


# --- commands


def submit(
    study: Path,
    *,
    address: str | None = None,
    store: str | None = None,
    overrides: Sequence[str] = (),
    shared: bool = False,
    follow: bool = False,
) -> str:
    """Submit a study; returns the job's id. With `follow`, prints the job's log until it ends.

    Raises SpecError for a study that cannot travel, EngineError for a cluster that cannot be reached, that refuses the
    token, or (following) a job that failed or was stopped.
    """
    asked, _ = load(_read(study), str(study), overrides)
    package = pack(study, asked, store, shared)
    with _client(address) as client, tempfile.TemporaryDirectory(prefix="portllm-submit-") as scratch:
        job = client.submit_job(
            entrypoint=entrypoint(package, overrides, python=sys.executable if shared else None),
            submission_id=job_id(asked.name),
            runtime_env=runtime_env(package, Path(scratch), checkout()),
            metadata={"portllm_study": asked.name, "portllm_store": package.store},
        )
    if follow:
        print(f"submitted {job}; results go to {package.store}", file=sys.stderr)
        follow_job(job, address)
    return str(job)


def jobs(address: str | None = None) -> list[Job]:
    """Jobs of the cluster, newest first."""
    with _client(address) as client:
        found = [_job(details) for details in client.list_jobs() if details.submission_id]
    return sorted(found, key=lambda job: job.started or float("inf"), reverse=True)


def logs(
    job: str, address: str | None = None, *, follow: bool = False, write: Callable[[str], Any] | None = None
) -> None:
    """Write a job's log to standard output, or through `write`; with `follow`, until the job ends."""
    write = write or _print
    if follow:
        follow_job(job, address, write)
        return
    with _client(address, job) as client:
        write(client.get_job_logs(job))


def cancel(job: str, address: str | None = None) -> bool:
    """Ask a job to stop; what it published stays. Returns whether it was still running."""
    with _client(address, job) as client:
        return bool(client.stop_job(job))


def follow_job(job: str, address: str | None = None, write: Callable[[str], Any] | None = None) -> None:
    """Write a job's log as it grows until the job ends. Raises EngineError if it failed or was stopped.

    Ray's own command ends with success when a job was stopped; here only SUCCEEDED is success.
    """
    write = write or _print
    with _client(address, job) as client:
        shown = 0
        while True:
            shown = asyncio.run(_tail(client, job, shown, write))
            info = client.get_job_info(job)
            if (status := _status(info)) in _ENDED:
                break
            time.sleep(_POLL_S)
    if status != "SUCCEEDED":
        reason = f": {info.message.strip()}" if info.message else ""
        raise EngineError(
            f"job {job} {status.lower()}{reason}\nwhat it published is kept; submit the study again to go on from there"
        )


async def _tail(client: JobSubmissionClient, job: str, shown: int, write: Callable[[str], Any]) -> int:
    """Write what the log holds beyond `shown` characters; returns how many were written in all.

    A connection lost on the way is no end: the caller asks for the state and comes back, and the log, which Ray sends
    from its start, is not written twice.
    """
    sent = 0
    with contextlib.suppress(RuntimeError, OSError):
        async for text in client.tail_job_logs(job):
            fresh = text[max(0, shown - sent) :]
            sent += len(text)
            if fresh:
                write(fresh)
    return max(shown, sent)


# --- what travels


def pack(file: Path, study: Study, store: str | None, shared: bool) -> Package:
    """What the job of a study needs. Raises SpecError, naming the field, for a study that cannot travel."""
    base = file.resolve().parent
    if shared:
        return Package(str(file.resolve()), str(_here(base, study, store)), (), base)
    kept = store or study.store
    if kept is None or not (kept.startswith("/") or "://" in kept):
        raise SpecError(
            f"{file}: give the job a store that outlives it: --store with an absolute path that every node "
            f"of the cluster sees (found {kept or 'none'}); or --shared if the cluster sees this folder"
        )
    named = _named_below(file, base, study)
    own = [file.resolve(), file.resolve().with_suffix(".lock.json")]
    files = tuple(dict.fromkeys(f for path in (*own, *named) for f in walk(path)))
    total = sum(f.stat().st_size for f in files)
    if total >= UPLOAD_LIMIT:
        largest = max(files, key=lambda f: f.stat().st_size)
        raise SpecError(
            f"{file}: the study and the files it names take {total / 1024**2:.0f} MiB, and Ray uploads "
            f"less than {UPLOAD_LIMIT // 1024**2} (largest: {largest.relative_to(base)}); put them on a "
            f"file system the cluster sees and name them by absolute paths, or use --shared"
        )
    return Package(file.resolve().name, kept, files, base)


def _here(base: Path, study: Study, store: str | None) -> Path | str:
    """The store `portllm run` would use on this machine, absolute."""
    if store and "://" in store:
        return store
    if store:
        return Path(store).resolve()
    return (base / Path(study.store).expanduser()).resolve() if study.store else Path("portllm-store").resolve()


def named_paths(study: Study, base: Path) -> Iterator[tuple[str, str]]:
    """(field, path) of every file or directory a study in `base` names; the tasks' own folders for `data_root`."""
    if study.data_root is not None:
        yield from (("data_root", f"{study.data_root}/{task}") for task in _tasks_with_data(study, base))
    yield from _paths_in(study.model_dump(exclude_none=True, exclude={"data_root", "store"}), "")


def _tasks_with_data(study: Study, base: Path) -> Iterator[str]:
    """Tasks, those of groups too, that have a folder in a `data_root` on this machine."""
    root = base / Path(study.data_root or "").expanduser()
    for task in study.tasks if root.is_relative_to(base) else ():
        include = base / Path(task.include_path).expanduser() if task.include_path else None
        if include is None or include.is_dir():
            yield from (member for member in expand(task.task, include) if data_directory(root, member, include))
        elif (root / task.task).is_dir():  # the definitions lie on the cluster: what is here of their data goes along
            yield task.task


def _paths_in(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            field = f"{where}.{name}" if where else str(name)
            if name in _PATH_FIELDS and isinstance(inner, str):
                yield field, inner
            else:
                yield from _paths_in(inner, field)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _paths_in(inner, f"{where}[{i}]")


def _named_below(file: Path, base: Path, study: Study) -> list[Path]:
    """Existing files and folders a study names by relative paths; absolute ones are the cluster's."""
    found = []
    for field, text in named_paths(study, base):
        path = Path(text).expanduser()
        if path.is_absolute():
            continue
        inside = Path(os.path.normpath(base / path))
        if not inside.is_relative_to(base):
            raise SpecError(
                f"{file}: {field}: {text} leaves the study's folder, so it is not uploaded; give an "
                f"absolute path that every node of the cluster sees, or --shared if it sees this folder"
            )
        if inside.exists():
            found.append(inside)
        elif not field.endswith(".shape"):  # a shape may be a name that ships with portllm
            raise SpecError(f"{file}: {field}: {inside} does not exist")
    return found


def walk(path: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Files below a path, behind links too, or the path itself; never repositories, environments, caches and stores.

    `above`: the real folders it lies in. Raises SpecError for a link that leads nowhere.
    """
    if path.is_file():
        yield path
    elif path.is_dir() and (real := path.resolve()) not in above:
        for inner in sorted(path.iterdir()):
            if not _excluded(inner):
                yield from walk(inner, (*above, real))
    elif path.is_symlink() and not path.exists():
        raise SpecError(f"{path} is a link that leads nowhere: mend or remove it")


def _excluded(path: Path) -> bool:
    return any(path.match(pattern) for pattern in NEVER_UPLOADED) or (path / "pyvenv.cfg").exists()


def entrypoint(package: Package, overrides: Sequence[str], python: str | None = None) -> str:
    """The shell line the job runs.

    `python` is used where the cluster has it: a head started from this environment need not have it on PATH.
    """
    arguments = ["-m", "portllm", "run", package.study, "--yes", "--address", "auto", "--store", package.store]
    for value in overrides:
        arguments += ["-o", value]
    command = shlex.join(arguments)
    if python is None:
        return f"python {command}"
    return f'"$(command -v {shlex.quote(python)} || echo python)" {command}'


def runtime_env(package: Package, scratch: Path, source: Path | None) -> dict[str, Any]:
    """Ray's runtime environment: the package's files copied to `scratch`, and portllm itself from a checkout."""
    env: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}
    if package.files:
        _copy(package.files, package.base, scratch)
        env["working_dir"] = str(scratch)
    if source is not None:
        env["py_modules"] = [str(source)]
        env["excludes"] = list(NEVER_UPLOADED)
    return env


def _copy(files: Iterable[Path], base: Path, target: Path) -> None:
    for file in files:
        place = target / file.relative_to(base)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def checkout() -> Path | None:
    """The portllm package's folder when it runs from a checkout; None when it is installed."""
    try:
        origin = importlib.metadata.distribution("portllm").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return Path(__file__).parents[1]
    editable = json.loads(origin or "{}").get("dir_info", {}).get("editable", False)
    return Path(__file__).parents[1] if editable else None


def job_id(study: str, now: float | None = None) -> str:
    """`portllm-NAME-DATE-TIME-xxxx`, UTC: readable in Ray's dashboard, and new every time."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
    return f"portllm-{study}-{stamp}-{secrets.token_hex(2)}"


# --- the cluster


def auth_headers(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """HTTP headers with the cluster's token, in Ray's order of places; empty where there is none."""
    if environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return {}
    token = environ.get("RAY_AUTH_TOKEN", "").strip()
    if not token:
        file = Path(environ.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token").expanduser()
        with contextlib.suppress(OSError):
            token = file.read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def dashboard_url(address: str | None) -> str | None:
    """The address as Ray's Jobs client wants it: `HOST:8265` means the dashboard; Ray alone would ask a GCS there."""
    if address and address != "auto" and "://" not in address:
        return f"http://{address}"
    return address


@contextlib.contextmanager
def _client(address: str | None, job: str | None = None) -> Iterator[JobSubmissionClient]:
    """A Jobs client, with every error of reaching the cluster said in our words."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient
    from requests.exceptions import RequestException

    where = address or next((os.environ[n] for n in _ADDRESS_VARIABLES if os.environ.get(n)), "this machine")
    try:
        with _address_wins(address):
            client = JobSubmissionClient(dashboard_url(address), headers=auth_headers(os.environ, Path.home()))
        yield client
    except AuthenticationError as error:
        raise EngineError(
            f"the Ray cluster at {where} refuses the token ({_first_line(error)}): put the cluster's token into "
            f"RAY_AUTH_TOKEN, or into ~/.ray/auth_token (on the head: `ray get-auth-token`)"
        ) from None
    except (ConnectionError, RequestException) as error:
        raise EngineError(
            f"no Ray dashboard at {where} ({_first_line(error)}): give --address http://HEAD:8265, and check that the "
            f"head runs with its dashboard and that the port is reachable"
        ) from None
    except EngineError:
        raise
    except RuntimeError as error:
        if job is not None and "404" in str(error):
            raise EngineError(f"the Ray cluster at {where} knows no job {job}; `portllm jobs` lists them") from None
        raise EngineError(f"the Ray cluster at {where}: {_first_line(error)}") from None


@contextlib.contextmanager
def _address_wins(address: str | None) -> Iterator[None]:
    """Ray lets RAY_ADDRESS override an address given in so many words; not here."""
    hidden = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if address and name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _job(details: Any) -> Job:
    return Job(
        id=str(details.submission_id),
        status=_status(details),
        study=(details.metadata or {}).get("portllm_study", ""),
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        message=details.message or "",
    )


def _status(info: Any) -> str:
    return str(getattr(info.status, "value", info.status))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise SpecError(f"{file}: cannot be read as a study file: {said}") from None
