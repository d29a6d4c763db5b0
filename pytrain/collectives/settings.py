"""How the groups of a run communicate."""

from dataclasses import dataclass, field
from typing import Literal

from pytrain.collectives.device_memory import DeviceBuffers
from pytrain.collectives.table import Eligible, Table
from pytrain.collectives.wire import Limits

MINUTES = 60.0


@dataclass(frozen=True)
class Settings:
    """The same on all ranks."""

    own: bool = False
    """Only algorithms of our own over point-to-point messages; else MPI's serve where the table says so."""
    deterministic: bool = True
    """Reductions in a fixed order only: MPI's own are out."""
    check: Literal["step", "each"] = "step"
    """When members compare what they are doing: in `check_sequence()` alone, or before each operation."""
    progress: Literal["auto", "thread", "test"] = "auto"
    """Who moves non-blocking operations on: a thread, or `poll()` between other work; "auto" takes the thread
    where the node has a core to spare for it (see `pytrain.collectives.process.choose_progress`)."""
    overlap: bool = True
    """False: collective operations are waited for as soon as they are started, to see what overlap is worth.
    Messages between two ranks stay under way all the same: a pipeline would hang otherwise."""
    spin: bool | None = None
    """Wait without giving the core away; None: where the threads of all ranks of the node fit its cores."""
    device_buffers: DeviceBuffers = "staged"
    """How arrays in a GPU's memory reach MPI (see `pytrain.collectives.device_memory`)."""
    watchdog_seconds: float = 10 * MINUTES
    """When nothing moves on any rank for so long the job ends with a report; 0: never. Longer than any
    stretch of work between two operations."""
    table: Table = field(default_factory=Table)
    limits: Limits = field(default_factory=Limits)

    @property
    def eligible(self) -> Eligible:
        """Which algorithms may be taken."""
        return Eligible(self.own, self.deterministic)
