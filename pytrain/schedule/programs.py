"""Who computes what in which order: the schedules of a pipeline, without communication.

With F = 1, B = 2 and I = W = 1 units of time, messages free, p ranks, v stages per rank and m micro-batches,
the ranks wait this long, as a share of the time they compute (`check` measures it):

    gpipe, 1f1b    (p-1) / m          arXiv 1811.06965, 2104.04473
    interleaved    (p-1) / (v m)      arXiv 2104.04473; where m is a multiple of p
    zero-bubble    (p-1) / (3 m)      arXiv 2401.10241; where m is at least p
"""

from collections.abc import Iterator

from pytrain.errors import UserError
from pytrain.schedule.actions import Action, Kind, Program, Programs

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")


def one_stage(micro_batches: int) -> Program:
    """The training program of a single stage: at most one micro-batch is in flight."""
    return (*one_f_one_b(1, micro_batches).ranks[0], Action(Kind.UPDATE, 0, None))


def forward_only(micro_batches: int) -> Program:
    """The evaluation program of a single stage."""
    return forward_only_pipeline(1, micro_batches).ranks[0]


def forward_only_pipeline(ranks: int, micro_batches: int, chunks_per_rank: int = 1) -> Programs:
    """Evaluation on a pipeline: each micro-batch through all stages, nothing kept.

    Raises:
        UserError: a size below 1, or several chunks on a single rank.
    """
    _check_sizes(ranks, micro_batches, chunks_per_rank)
    # Nothing but one activation is kept per stage, so that a group must not outgrow the ring of p ranks.
    groups = [min(ranks, micro_batches - first) for first in range(0, micro_batches, ranks)]
    order = _forward_order(chunks_per_rank, groups)
    programs = [
        tuple(Action(Kind.FORWARD, chunk * ranks + rank, microbatch) for chunk, microbatch in order)
        for rank in range(ranks)
    ]
    return Programs("forward-only", tuple(programs), chunks_per_rank, micro_batches)


def gpipe(stages: int, micro_batches: int) -> Programs:
    """All forwards, then all backwards: every micro-batch is in flight at once (GPipe, arXiv 1811.06965).

    Raises:
        UserError: a size below 1.
    """
    _check_sizes(stages, micro_batches, 1)
    programs = [
        tuple(
            Action(kind, rank, microbatch)
            for kind in (Kind.FORWARD, Kind.BACKWARD)
            for microbatch in range(micro_batches)
        )
        for rank in range(stages)
    ]
    return Programs("gpipe", tuple(programs), 1, micro_batches)


def one_f_one_b(stages: int, micro_batches: int) -> Programs:
    """One forward, one backward, in turn: rank r never has more than p - r micro-batches in flight.

    The same bubble as GPipe at less memory (PipeDream-Flush, arXiv 2006.09503; arXiv 2104.04473).

    Raises:
        UserError: a size below 1.
    """
    _check_sizes(stages, micro_batches, 1)
    programs = []
    for rank in range(stages):
        forwards = [Action(Kind.FORWARD, rank, microbatch) for microbatch in range(micro_batches)]
        backwards = [Action(Kind.BACKWARD, rank, microbatch) for microbatch in range(micro_batches)]
        programs.append(_alternate(forwards, backwards, warm_up=stages - rank - 1))
    return Programs("1f1b", tuple(programs), 1, micro_batches)


def interleaved_one_f_one_b(ranks: int, chunks_per_rank: int, micro_batches: int) -> Programs:
    """1F1B in which each rank holds several stages of the pipeline, p apart (arXiv 2104.04473).

    The bubble shrinks by the number of chunks; messages and, somewhat, memory grow. Micro-batches go through
    the chunks in groups of p; where p does not divide their number the groups are larger, and so are bubble
    and memory. Gradients then also queue up before the first rank, which waits for its two buffers up to
    2 (m mod p - 1) units longer than its data would make it: better a multiple of p.

    Raises:
        UserError: a size below 1, or several chunks on a single rank.
    """
    _check_sizes(ranks, micro_batches, chunks_per_rank)
    groups = _group_sizes(ranks, micro_batches)
    order = _forward_order(chunks_per_rank, groups)
    last = chunks_per_rank - 1
    programs = []
    for rank in range(ranks):
        forwards = [Action(Kind.FORWARD, chunk * ranks + rank, microbatch) for chunk, microbatch in order]
        backwards = [Action(Kind.BACKWARD, (last - chunk) * ranks + rank, microbatch) for chunk, microbatch in order]
        # With several chunks a micro-batch passes p - r - 1 ranks below this one on its way to the last
        # stage and again on its way back, and the forwards of a whole group of p lie before each chunk.
        rounds = 1 if chunks_per_rank == 1 else 2
        warm_up = (ranks - rank - 1) * rounds + last * max(groups)
        programs.append(_alternate(forwards, backwards, warm_up))
    return Programs("interleaved", tuple(programs), chunks_per_rank, micro_batches)


def zero_bubble(ranks: int, micro_batches: int) -> Programs:
    """1F1B with the weight gradients put off into the time that ranks would wait (ZB-H1, arXiv 2401.10241).

    The input gradient alone travels at once, so the pipeline drains sooner; weight gradients fill the rest.
    Activations on the way from F to B stay at 1F1B's p - r. Those from F to W, and with them the number of
    slots, reach min(p, m) on every rank: as many as on the first rank of 1F1B, which is the fullest there,
    but more than 1F1B's p - r on the others. On rank r up to min(r + 1, m) micro-batches also keep the
    output gradients of every product, from I to W.

    Raises:
        UserError: a size below 1.
    """
    _check_sizes(ranks, micro_batches, 1)
    programs = tuple(tuple(_zero_bubble_rank(ranks, rank, micro_batches)) for rank in range(ranks))
    return Programs("zero-bubble", programs, 1, micro_batches)


def _zero_bubble_rank(ranks: int, rank: int, micro_batches: int) -> Iterator[Action]:
    forwards = min(ranks - rank, micro_batches)
    weights = 0
    for microbatch in range(forwards):
        yield Action(Kind.FORWARD, rank, microbatch)
    for microbatch in range(micro_batches):
        yield Action(Kind.BACKWARD_INPUT, rank, microbatch)
        # A weight gradient is due when the next forward would otherwise be one too many, and, once there
        # are no more forwards, while the next input gradient is on its way.
        if forwards == micro_batches or forwards - weights == ranks:
            yield Action(Kind.BACKWARD_WEIGHT, rank, weights)
            weights += 1
        if forwards < micro_batches:
            yield Action(Kind.FORWARD, rank, forwards)
            forwards += 1
    for microbatch in range(weights, micro_batches):
        yield Action(Kind.BACKWARD_WEIGHT, rank, microbatch)


def programs_of(schedule: str, ranks: int, micro_batches: int, chunks_per_rank: int = 1) -> Programs:
    """The schedule of a name, one of `SCHEDULES`.

    Raises:
        UserError: no such schedule, a size below 1, or several chunks where the schedule has none.
    """
    if schedule not in SCHEDULES:
        raise UserError(f'schedule must be one of {", ".join(SCHEDULES)}, not "{schedule}"')
    if schedule == "interleaved":
        return interleaved_one_f_one_b(ranks, chunks_per_rank, micro_batches)
    if chunks_per_rank != 1:
        raise UserError(f"schedule {schedule} has one chunk per rank, not {chunks_per_rank}; interleaved has several")
    build = {"gpipe": gpipe, "1f1b": one_f_one_b, "zero-bubble": zero_bubble}[schedule]
    return build(ranks, micro_batches)


def _alternate(forwards: list[Action], backwards: list[Action], warm_up: int) -> Program:
    """`warm_up` forwards, then a forward and a backward in turn, then the backwards that remain."""
    warm_up = min(warm_up, len(forwards))
    program = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        program += (forward, backward)
    return (*program, *backwards[len(forwards) - warm_up :])


def _group_sizes(ranks: int, micro_batches: int) -> list[int]:
    """Micro-batches that pass a rank's chunks together: p, or a little more where p does not divide them.

    A last group smaller than p would need to come round before those ahead of it have gone backward, and the
    ranks would wait for each other in a circle.
    """
    groups = max(micro_batches // ranks, 1)
    return [micro_batches // groups + (group < micro_batches % groups) for group in range(groups)]


def _forward_order(chunks_per_rank: int, group_sizes: list[int]) -> list[tuple[int, int]]:
    """(chunk, micro-batch) in the order of a rank's forwards: group by group, in it chunk by chunk."""
    order, first = [], 0
    for size in group_sizes:
        for chunk in range(chunks_per_rank):
            order += [(chunk, microbatch) for microbatch in range(first, first + size)]
        first += size
    return order


def _check_sizes(ranks: int, micro_batches: int, chunks_per_rank: int) -> None:
    sizes = {"pipeline ranks": ranks, "micro-batches": micro_batches, "chunks per rank": chunks_per_rank}
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"the number of {name} must be at least 1, not {size}")
    if ranks == 1 and chunks_per_rank > 1:
        raise UserError(f"{chunks_per_rank} chunks per rank need at least 2 pipeline ranks: a single one never waits")
