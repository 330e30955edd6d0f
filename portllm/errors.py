"""The errors a user meets.

    PortllmError
    ├── SpecError      the study file asks for something impossible      (also ValueError)
    ├── ResolveError   a model, corpus, task or patch is not as named    (also ValueError)
    ├── StoreError     the store cannot do what was asked                (also OSError)
    ├── StageError     a stage cannot do its work                        (also RuntimeError)
    └── EngineError    the cluster cannot run the plan                   (also RuntimeError)

Every message says what is wrong, where (file, field or tensor) and how to mend it. The command line turns `SpecError`
and `ResolveError` into exit code 2 (nothing was spent), the others into exit code 1.
"""


class PortllmError(Exception):
    """Base of every error with a message meant for a user."""


class SpecError(PortllmError, ValueError):
    """The study file, or a command's argument, is wrong."""


class ResolveError(PortllmError, ValueError):
    """Something the study names is missing or unfit."""


class StoreError(PortllmError, OSError):
    """The store is damaged, full or out of reach."""


class StageError(PortllmError, RuntimeError):
    """A stage cannot do its work: non-finite loss, too few tokens, a patch that does not fit."""


class EngineError(PortllmError, RuntimeError):
    """The cluster cannot run the plan."""
