"""Programs with one small mistake: the proof must not hold for any of them."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from pytrain.schedule import SCHEDULES, Action, Kind, Lowered, Program, ScheduleError, check, lower
from tests.schedule.executor import Executor, WrongError
from tests.schedule.grids import build, random_lowered

_SENDS = (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)
_RECEIVES = (Kind.RECV_FORWARD, Kind.RECV_BACKWARD)
_WAITS = {Kind.WAIT_SEND_FORWARD: Kind.SEND_FORWARD, Kind.WAIT_SEND_BACKWARD: Kind.SEND_BACKWARD}

Resource = tuple[object, ...]


def touched(action: Action) -> tuple[set[Resource], set[Resource]]:
    """(what an action reads, what it writes) on its rank: buffers, channels, sends, a stage's gradients."""
    slot: Resource = ("slot", action.stage, action.slot)
    gradient: Resource = ("gradient", action.stage, action.gradient)
    buffer = slot if action.kind in (Kind.SEND_FORWARD, Kind.RECV_FORWARD, Kind.WAIT_SEND_FORWARD) else gradient
    weights: Resource = ("weights", action.stage)
    backward: Resource = ("backward", action.stage, action.microbatch)
    if action.kind is Kind.FORWARD:
        return set(), {slot}
    if action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
        reads = {slot, weights} if action.kind is Kind.BACKWARD else {slot}
        return reads, {backward} | ({gradient} if action.gradient is not None else set())
    if action.kind is Kind.BACKWARD_WEIGHT:
        return {slot, weights, backward}, set()
    if action.kind in _SENDS:
        return {buffer}, {("to", action.peer), ("send", action.kind, action.stage, action.microbatch)}
    if action.kind in _RECEIVES:
        return set(), {buffer, ("from", action.peer)}
    if action.kind in _WAITS:
        return {buffer}, {("send", _WAITS[action.kind], action.stage, action.microbatch)}
    return set(), {weights}  # TIED, REDUCE


def conflict(one: Action, other: Action) -> bool:
    """Whether it matters which of two neighbours comes first: one writes what the other reads or writes."""
    if Kind.UPDATE in (one.kind, other.kind):
        return True
    (reads, writes), (other_reads, other_writes) = touched(one), touched(other)
    return bool(writes & (other_reads | other_writes) or reads & other_writes)


def with_program(lowered: Lowered, rank: int, program: Program) -> Lowered:
    return replace(lowered, ranks=(*lowered.ranks[:rank], program, *lowered.ranks[rank + 1 :]))


def drop(lowered: Lowered, random: Random) -> tuple[str, Lowered]:
    rank = random.randrange(len(lowered.ranks))
    program = lowered.ranks[rank]
    place = random.randrange(len(program))
    mutant = program[:place] + program[place + 1 :]
    return f"rank {rank} without {program[place]}", with_program(lowered, rank, mutant)


def double(lowered: Lowered, random: Random) -> tuple[str, Lowered]:
    rank = random.randrange(len(lowered.ranks))
    program = lowered.ranks[rank]
    place, second = random.randrange(len(program)), random.randrange(len(program) + 1)
    mutant = (*program[:second], program[place], *program[second:])
    return f"rank {rank} with {program[place]} again at {second}", with_program(lowered, rank, mutant)


def swap(lowered: Lowered, random: Random, conflicting: bool) -> tuple[str, Lowered] | None:
    """Two neighbours exchanged whose order matters, or does not; None if there are none."""
    places = [
        (rank, place)
        for rank, program in enumerate(lowered.ranks)
        for place in range(len(program) - 1)
        if conflict(program[place], program[place + 1]) == conflicting
    ]
    if not places:
        return None
    rank, place = random.choice(places)
    program = list(lowered.ranks[rank])
    program[place], program[place + 1] = program[place + 1], program[place]
    what = f"rank {rank} with {program[place + 1]} after {program[place]}"
    return what, with_program(lowered, rank, tuple(program))


def mutant_of(lowered: Lowered, random: Random) -> tuple[str, str, Lowered]:
    """(way, description, mutant): a third each are drops, doubles and swaps of neighbours that conflict."""
    way = random.choice(("drop", "double", "swap"))
    swapped = swap(lowered, random, conflicting=True) if way == "swap" else None
    if swapped is not None:
        return "swap", *swapped
    if way == "double":
        return "double", *double(lowered, random)
    return "drop", *drop(lowered, random)


def test_a_thousand_mutants_are_rejected(seed: int) -> None:
    random = Random(seed)
    ways: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for number in range(1000):
        lowered = random_lowered(random)
        check(lowered)
        way, description, mutant = mutant_of(lowered, random)
        ways[way] += 1
        try:
            check(mutant)
        except ScheduleError as error:
            kinds[str(error).split(":")[0].split(" ")[0]] += 1
        else:
            pytest.fail(f"mutant {number} of {lowered.schedule} {lowered} was accepted: {description}")
    print(ways, kinds)
    assert min(ways.values()) > 250


@pytest.mark.parametrize("way", ["drop", "double"])
def test_every_drop_and_double_of_one_pipeline_is_rejected(way: str) -> None:
    for schedule in SCHEDULES:
        lowered = lower(build((schedule, 3, 4, 2 if schedule == "interleaved" else 1)), tied=True)
        for rank, program in enumerate(lowered.ranks):
            for place in range(len(program)):
                more = program[place : place + 1] * (2 if way == "double" else 0)
                mutant = with_program(lowered, rank, (*program[:place], *more, *program[place + 1 :]))
                with pytest.raises(ScheduleError):
                    check(mutant)


def test_every_swap_that_matters_of_one_pipeline_is_rejected() -> None:
    for schedule in SCHEDULES:
        lowered = lower(build((schedule, 3, 4, 2 if schedule == "interleaved" else 1)), tied=True)
        for rank, program in enumerate(lowered.ranks):
            for place in range(len(program) - 1):
                one, other = program[place : place + 2]
                mutant = with_program(lowered, rank, (*program[:place], other, one, *program[place + 2 :]))
                if conflict(one, other):
                    with pytest.raises(ScheduleError):
                        check(mutant)


def test_wrong_buffers_are_rejected(seed: int) -> None:
    random = Random(seed)
    for _ in range(300):
        lowered = random_lowered(random)
        rank = random.randrange(len(lowered.ranks))
        program = list(lowered.ranks[rank])
        place = random.choice(
            [index for index, action in enumerate(program) if (action.slot, action.gradient) != (None, None)]
        )
        action = program[place]
        field = "slot" if action.slot is not None else "gradient"
        program[place] = replace(action, **{field: getattr(action, field) + random.choice((-1, 1))})
        with pytest.raises(ScheduleError):
            check(with_program(lowered, rank, tuple(program)))


def test_what_fails_when_it_runs_is_rejected(seed: int) -> None:
    """Swaps of any neighbours: a mutant that computes wrongly, or hangs, must not be proven right."""
    random = Random(seed)
    outcomes: Counter[tuple[bool, bool]] = Counter()
    for _ in range(600):
        lowered = random_lowered(random)
        mutation = swap(lowered, random, conflicting=random.random() < 0.3)
        if mutation is None:
            continue
        description, mutant = mutation
        try:
            works = set(Executor(mutant, random).run().values()) == {1}
        except (WrongError, KeyError):
            works = False
        try:
            check(mutant)
            accepted = True
        except ScheduleError:
            accepted = False
        assert works or not accepted, f"{description} fails, but was accepted"
        outcomes[works, accepted] += 1
    print(outcomes)
    assert outcomes[True, True] > 100, "the proof refuses what works"
    assert outcomes[False, False] > 50


def test_mutants_from_before_lowering_are_rejected(seed: int) -> None:
    random = Random(seed)
    for _ in range(300):
        schedule = random.choice(SCHEDULES)
        programs = build((schedule, random.randint(1, 4), random.randint(2, 6), 1))
        rank = random.randrange(len(programs.ranks))
        program = programs.ranks[rank]
        place = random.randrange(len(program))
        more = program[place : place + 1] * random.choice((0, 2))
        ranks = list(programs.ranks)
        ranks[rank] = (*program[:place], *more, *program[place + 1 :])
        with pytest.raises(ScheduleError):
            check(lower(replace(programs, ranks=tuple(ranks))))
