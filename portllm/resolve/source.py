"""Files a study names: found relative to the study file, checked, digested, and remembered for the cache of facts."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from portllm.errors import ResolveError
from portllm.resolve.digests import DigestCache, stat_signature
from portllm.study.facts import Given
from portllm.study.keys import given_key


@dataclass
class Sources:
    """Access to what a study names; every path looked at is in `seen`."""

    base: Path
    """Directory of the study file: relative paths start here."""
    digests: DigestCache
    seen: dict[str, str] = field(default_factory=dict)
    """Absolute path to stat signature."""

    def path(self, text: str) -> Path:
        """A path as written in the study file, absolute."""
        try:
            path = (self.base / Path(text).expanduser()).resolve()
            path.exists()
        except (OSError, ValueError, RuntimeError) as error:
            raise ResolveError(f"`{text[:80]}` is no path: {error}") from None
        return path

    def file(self, text: str, field: str, mend: str = "") -> Path:
        """An existing file; ResolveError names the field."""
        path = self.path(text)
        if not path.is_file():
            kind = "is a directory, a file is meant" if path.is_dir() else "does not exist"
            raise ResolveError(f"{field}: {path} {kind}{'; ' + mend if mend else ''}")
        self._note_both(text, path)
        return path

    def directory(self, text: str, field: str) -> Path:
        """An existing directory; ResolveError names the field."""
        path = self.path(text)
        if not path.is_dir():
            kind = "is a file, a directory is meant" if path.exists() else "does not exist"
            raise ResolveError(f"{field}: {path} {kind}")
        self._note_both(text, path)
        return path

    def given(self, what: str, path: Path, files: Iterable[Path]) -> Given:
        """Something used where it lies, identified by the content of its files."""
        files = list(files)
        for file in files:
            self.note(file)
        base = path if path.is_dir() else path.parent
        # A single file is its content, whatever it is called; a directory's file names matter.
        content = self.digests.file(path) if path.is_file() else self.digests.files(files, base)
        return Given(given_key(what, content), str(path), what)

    def _note_both(self, text: str, path: Path) -> None:
        """Where a path leads, and the path as written: a link may lead elsewhere later."""
        self.note(self.base / Path(text).expanduser())
        self.note(path)

    def note(self, path: Path) -> None:
        """Remember a path for the cache of facts."""
        self.seen[str(path)] = stat_signature(path)


@contextlib.contextmanager
def about(field: str) -> Iterator[None]:
    """Errors of what is read inside name the study's field as well."""
    try:
        yield
    except ResolveError as error:
        raise ResolveError(f"{field}: {error}") from None
