"""Which start of a run wrote something, and what that start goes on from."""

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ancestor:
    """An earlier start, up to the last of its steps that a later one goes on from."""

    run_id: str
    step: int


@dataclass(frozen=True)
class Lineage:
    """A start of the script: a state and a line of metrics.jsonl hold its run id.

    Attributes:
        run_id: of this start, unlike that of any other.
        parent: the run id of the start whose state it goes on from.
        attempt: counts the starts in an output folder, from 1; higher than those of everything that lay there.
        ancestors: all starts that it goes on from, the first one first.
    """

    run_id: str
    parent: str | None
    attempt: int
    ancestors: tuple[Ancestor, ...] = ()

    @property
    def step(self) -> int:
        """Optimizer steps that were done before this start."""
        return self.ancestors[-1].step if self.ancestors else 0

    def includes(self, run_id: str, step: int) -> bool:
        """Whether this start goes on from what another one had after that many steps."""
        return any(one.run_id == run_id and step <= one.step for one in self.ancestors)


def new_lineage(parent: Lineage | None, step: int, attempts: Iterable[int]) -> Lineage:
    """The lineage of a start that begins now.

    Args:
        parent: of the state that it goes on from, None where it begins anew.
        step: of that state.
        attempts: that are known in its output folder.
    """
    attempt = 1 + max([*attempts, parent.attempt if parent else 0], default=0)
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    if parent is None:
        return Lineage(run_id, None, attempt)
    return Lineage(run_id, parent.run_id, attempt, (*parent.ancestors, Ancestor(parent.run_id, step)))


def lineage_of(plain: dict[str, object]) -> Lineage:
    """A lineage from the JSON values that `dataclasses.asdict` made of it.

    Raises:
        KeyError, TypeError, ValueError: they are not what it should be.
    """
    ancestors = plain["ancestors"]
    parent = plain["parent"]
    if not isinstance(ancestors, list) or type(plain["attempt"]) is not int:
        raise ValueError("ancestors or attempt")
    return Lineage(
        str(plain["run_id"]),
        None if parent is None else str(parent),
        plain["attempt"],
        tuple(Ancestor(str(one["run_id"]), int(one["step"])) for one in ancestors),
    )
