"""Step programs, and how many micro-batches are in flight in them."""

from pytrain.schedule import Action, Kind, Program, forward_only, one_stage, peak_in_flight

KINDS = {kind.value: kind for kind in Kind}


def program(text: str) -> Program:
    """`F0 F1 B0 U` of one stage."""
    return tuple(Action(KINDS[word[0]], 0, int(word[1:]) if word[1:] else None) for word in text.split())


def test_one_stage_takes_the_micro_batches_in_turn() -> None:
    assert one_stage(3) == program("F0 B0 F1 B1 F2 B2 U")
    assert " ".join(map(str, one_stage(2))) == "0F0 0B0 0F1 0B1 0U"


def test_evaluation_has_no_backward() -> None:
    assert forward_only(2) == program("F0 F1")


def test_micro_batches_in_flight() -> None:
    assert peak_in_flight(one_stage(5)) == 1
    assert peak_in_flight(program("F0 F1 B0 F2 B1 B2 U")) == 2
    assert peak_in_flight(program("F0 F1 F2 B2 B1 B0 U")) == 3


def test_a_late_weight_gradient_keeps_its_slot() -> None:
    assert peak_in_flight(program("F0 I0 W0 F1 I1 W1 U")) == 1
    assert peak_in_flight(program("F0 I0 F1 I1 W0 F2 I2 W1 W2 U")) == 2


def test_evaluation_keeps_nothing() -> None:
    assert peak_in_flight(forward_only(9)) == 1
