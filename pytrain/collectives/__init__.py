"""Collective operations of our own, over MPI point-to-point messages, and MPI's where a run allows them.

`Group` is the group of one and imports nothing of MPI; `pytrain.launch.world` gives the group of all ranks.
"""

from pytrain.collectives.counters import Counters
from pytrain.collectives.group import Finished, Group, Handle, SharedError
from pytrain.collectives.journal import CollectiveMismatchError
from pytrain.collectives.settings import Settings
from pytrain.collectives.table import Table, from_json, read_table
from pytrain.collectives.wire import Limits

__all__ = [
    "CollectiveMismatchError",
    "Counters",
    "Finished",
    "Group",
    "Handle",
    "Limits",
    "Settings",
    "SharedError",
    "Table",
    "from_json",
    "read_table",
]
