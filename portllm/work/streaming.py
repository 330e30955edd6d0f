"""Files written piece by piece, pieces in any order and at once: bytes the kernel copies, and bytes that are made.

    outputs → every file at its full size → pieces over the threads → on their way to the disk where it is to be durable

Memory is what the threads hold while they make a piece, whatever the files' sizes. Nothing here knows torch: copying
starts before it is imported.
"""

import ctypes
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

COPY = 1 << 25
"""Bytes of one copying piece: small enough for the threads to share the end of a file."""
WRITE = 1 << 18
"""Bytes of one write. Of a larger one ext4 asks for memory in blocks as large, which may have to be made first: 2.2 GB
took 0.5 s in writes of 64 or 256 KB, 1.7 s of 1 MB, 3.2 s of 4 MB, 6.8 s of 23 MB (Linux 6.18, a virtual machine)."""
Progress = Callable[[int], None]
"""Called with the bytes that were written since the last call, from any thread."""


@dataclass(frozen=True)
class Copied:
    """Bytes [start, start + length) of a file."""

    source: Path
    start: int
    length: int

    def parts(self, at: int) -> Iterator[tuple["Copied", int]]:
        """The same in pieces of `COPY` bytes, each with its place."""
        for done in range(0, self.length, COPY):
            yield Copied(self.source, self.start + done, min(COPY, self.length - done)), at + done


@dataclass(frozen=True)
class Made:
    """Bytes that a function makes; what it returns is written before the same thread calls for another."""

    length: int
    make: Callable[[], memoryview]


Piece = Copied | Made


@dataclass(frozen=True)
class Output:
    """A file to write: its pieces, one after the other, without holes."""

    path: Path
    pieces: Sequence[Piece]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(piece.length for piece in self.pieces)

    def placed(self) -> Iterator[tuple[Piece, int]]:
        """Each piece with its offset in the file."""
        at = 0
        for piece in self.pieces:
            yield piece, at
            at += piece.length


def write_files(outputs: Sequence[Output], threads: int, durable: bool, progress: Progress = lambda n: None) -> None:
    """Writes every output; the first error of any thread is raised once all have stopped.

    Raises OSError for a full disk before the first piece: every file gets its full size from the start.
    """
    with ExitStack() as stack:
        jobs = _Jobs(stop=threading.Event())
        for output in outputs:
            target = stack.enter_context(output.path.open("xb", buffering=0)).fileno()
            if output.size:
                _allocate(target, output.size)
            jobs.add(output, target)
        _run(jobs, threads, durable, progress)


def _allocate(target: int, size: int) -> None:
    """A file's full size, its space reserved where the file system can.

    Linux's own call: where there is none (NFS before 4.2), C's `posix_fallocate` writes a byte into every 4 KB.
    """
    if _libc.fallocate(target, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
        raise OSError(number, os.strerror(number))
    os.ftruncate(target, size)


_libc = ctypes.CDLL(None, use_errno=True)


class _Jobs:
    """What is left to write. One thread prefers to copy, the others to make; each helps out at the end."""

    def __init__(self, stop: threading.Event) -> None:
        self.copies: deque[tuple[Copied, int, int]] = deque()
        self.makes: deque[tuple[Made, int, int]] = deque()
        self.stop = stop
        self.lock = threading.Lock()

    def add(self, output: Output, target: int) -> None:
        for piece, at in output.placed():
            if isinstance(piece, Made):
                self.makes.append((piece, target, at))
            else:
                self.copies += ((part, target, where) for part, where in piece.parts(at))

    def next(self, copying: bool) -> tuple[Piece, int, int] | None:
        """A piece, its file and its offset."""
        first, second = (self.copies, self.makes) if copying else (self.makes, self.copies)
        with self.lock:
            if self.stop.is_set():
                return None
            return first.popleft() if first else second.popleft() if second else None


def _run(jobs: _Jobs, threads: int, durable: bool, progress: Progress) -> None:
    with ThreadPoolExecutor(max(1, threads)) as pool:
        try:
            running = [pool.submit(_work, jobs, number == 0, durable, progress) for number in range(max(1, threads))]
            ended, _ = wait(running, return_when=FIRST_EXCEPTION)
            for future in ended:
                future.result()
        finally:
            jobs.stop.set()


def _work(jobs: _Jobs, copying: bool, durable: bool, progress: Progress) -> None:
    while (job := jobs.next(copying)) is not None:
        piece, target, at = job
        if isinstance(piece, Made):
            _put(target, piece.make(), at)
        else:
            copy_range(piece, target, at)
        if durable:  # starts the write-back of this piece: the flush before publishing finds little left
            os.posix_fadvise(target, at, piece.length, os.POSIX_FADV_DONTNEED)
        progress(piece.length)


def copy_range(piece: Copied, target: int, at: int) -> None:
    """Inside the kernel (sharing blocks where the file system can), or through memory where it cannot.

    Raises OSError where the source has become shorter.
    """
    source = os.open(piece.source, os.O_RDONLY)
    try:
        done = 0
        while done < piece.length:
            done += _copied(source, target, piece.length - done, piece.start + done, at + done) or _short(piece)
    finally:
        os.close(source)


def _copied(source: int, target: int, length: int, start: int, at: int) -> int:
    try:
        return os.copy_file_range(source, target, length, start, at)
    except OSError:  # across file systems of different kinds, or one without the call
        content = os.pread(source, length, start)
        _put(target, memoryview(content), at)
        return len(content)


def _short(piece: Copied) -> int:
    raise OSError(0, "became shorter while it was read", str(piece.source))


def _put(target: int, content: memoryview, at: int) -> None:
    """All of it, in writes of at most `WRITE` bytes."""
    while len(content):
        done = os.pwrite(target, content[:WRITE], at)
        content, at = content[done:], at + done
