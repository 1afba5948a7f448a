"""What every workload is, so that run.py can treat them alike.

A workload is collected in the parent process, which imports no peer and computes nothing: `collect` asks for
calls of the workload's own methods, each in a fresh process, and puts their answers together. In the child
these methods import and compute. With `tiny` a workload shrinks until it runs in a second: the same code,
figures of no meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from benchmarks.harness import Record

Spawn = Callable[..., Record]  # spawn("method", argument=...) -> what it returned in a fresh process


class Workload(Protocol):
    """One row of the table, or a few."""

    @property
    def name(self) -> str:
        """What the command line calls it."""
        ...

    @property
    def title(self) -> str:
        """What it is, in a line."""
        ...

    @property
    def calls(self) -> tuple[str, ...]:
        """Methods that may be spawned."""
        ...

    def collect(self, spawn: Spawn, rounds: int) -> Record:
        """The workload's record: JSON, with a key "kind" that tells report.py how to print it."""
        ...
