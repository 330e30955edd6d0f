"""The errors a user meets.

    PortllmError
    ├── SpecError      the study file asks for something impossible      (also ValueError)
    ├── ResolveError   a model, corpus, task or patch is not as named    (also ValueError)
    ├── StoreError     the store cannot do what was asked                (also OSError)
    ├── StageError     a stage cannot do its work                        (also RuntimeError)
    │   └── Preempted  it was told to stop, and kept what it had
    └── EngineError    the cluster cannot run the plan                   (also RuntimeError)

Every message says what is wrong, where (file, field or tensor) and how to mend it. The command line turns `SpecError`
and `ResolveError` into exit code 2 (nothing was spent), the others into exit code 1.
"""


class PortllmError(Exception):
    """Base of every error with a message meant for a user."""


class SpecError(PortllmError, ValueError):
    """The study file, or a command's argument, is wrong."""


class ResolveError(PortllmError, ValueError):
    """Something the study names is missing or unfit; one line of printable text, whatever the names in it hold."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class StoreError(PortllmError, OSError):
    """The store is damaged, full or out of reach."""


class StageError(PortllmError, RuntimeError):
    """A stage cannot do its work: non-finite loss, too few tokens, a patch that does not fit."""


class Preempted(StageError):
    """A stage was told to stop; run again, it goes on from where it was."""


class EngineError(PortllmError, RuntimeError):
    """The cluster cannot run the plan."""


def out_of_memory(type_name: str, message: str) -> bool:
    """Whether an error, named by its class and its message, is one of want of memory, on the device or the host."""
    text = f"{type_name} {message}".lower()
    return type_name == "MemoryError" or any(words in text for words in _MEMORY)


_MEMORY = ("outofmemory", "out of memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed")


def printable(text: str) -> str:
    """A text with line ends, terminal escapes and lone surrogates written out: names come from files."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
