"""The one retry authority. Pure: an error and its history in, a decision out. Ray's own retries are off."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from portllm.errors import out_of_memory


class Decision(Enum):
    """What to do with a step whose attempt failed."""

    RETRY = "retry the same"
    SMALLER = "retry with half the micro-batch"
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Failure:
    """One failed attempt."""

    type: str
    """Class of the error, or `WorkerDied`; `Preempted` where the process was told to end."""
    message: str
    traceback: str = ""
    """Its tail."""
    log: str = ""
    """Path of the step's log."""

    @property
    def lost_device(self) -> bool:
        """Whether the process's context on its GPU is lost: after an assertion, an illegal access or an ECC error every
        later call fails."""
        said = self.type == "AcceleratorError" or "cuda error" in self.message.lower()
        return said and not out_of_memory(self.type, self.message)


ATTEMPTS = 3
"""Executions of one step before it is given up, whatever the reasons."""
DIED, PREEMPTED = "WorkerDied", "Preempted"


def decide(history: Sequence[Failure]) -> Decision:
    """The decision after the last failure of `history`.

    A dead worker, or a GPU that went wrong, says nothing about the step: the same again, and one that was told to stop
    does not even count. One that died twice may have been killed for its memory, which the system tells nobody:
    smaller, as where memory is said to have run out. Whatever a stage raised itself (a non-finite loss, a full disk, a
    bad input) would be raised again: give up.
    """
    last = history[-1]
    if last.type == PREEMPTED:
        return Decision.RETRY
    if sum(failure.type != PREEMPTED for failure in history) >= ATTEMPTS:
        return Decision.GIVE_UP
    if last.type == DIED:
        return Decision.SMALLER if sum(failure.type == DIED for failure in history) > 1 else Decision.RETRY
    if out_of_memory(last.type, last.message):
        return Decision.SMALLER
    return Decision.RETRY if last.lost_device else Decision.GIVE_UP
