"""The training step as a program: a list of actions per rank, which the engine interprets.

`programs` says in which order each rank computes, `lower` inserts the communication, `check` proves the
result without MPI and times it, `timeline` draws it. A single process is the one-stage program: forward and
backward of each micro-batch in turn, then the update.
"""

from pytrain.schedule.actions import (
    Action,
    Kind,
    Lowered,
    Program,
    Programs,
    ScheduleError,
    peak_in_flight,
)
from pytrain.schedule.check import Peaks, Report, check
from pytrain.schedule.early import early_receives
from pytrain.schedule.lower import lower
from pytrain.schedule.programs import (
    SCHEDULES,
    forward_only,
    forward_only_pipeline,
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    one_stage,
    programs_of,
    zero_bubble,
)
from pytrain.schedule.simulate import Costs, Span

__all__ = [
    "SCHEDULES",
    "Action",
    "Costs",
    "Kind",
    "Lowered",
    "Peaks",
    "Program",
    "Programs",
    "Report",
    "ScheduleError",
    "Span",
    "check",
    "early_receives",
    "forward_only",
    "forward_only_pipeline",
    "gpipe",
    "interleaved_one_f_one_b",
    "lower",
    "one_f_one_b",
    "one_stage",
    "peak_in_flight",
    "programs_of",
    "zero_bubble",
]
