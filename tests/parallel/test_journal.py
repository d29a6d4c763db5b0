"""Histories and the watchdog's verdict, without MPI and without waiting."""

import pickle

from pytrain.collectives.journal import LAST_OPERATIONS, History, Journal, differences
from pytrain.collectives.watchdog import Report, is_stuck, report_of, verdict


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def histories(*operations: list[str]) -> dict[int, History]:
    found = {}
    ranks = tuple(10 + member for member in range(len(operations)))
    for member, texts in enumerate(operations):
        found[member] = History(ranks, member)
        for text in texts:
            found[member].collective.add(text)
    return found


def test_equal_histories_have_no_differences() -> None:
    assert differences("tp", histories(["a", "b"], ["a", "b"], ["a", "b"])) == []


def test_one_who_is_elsewhere_is_named() -> None:
    (sentence,) = differences("tp", histories(["a", "b"], ["a", "c"], ["a", "b"]))
    assert sentence == "group tp: rank 11 at operation 2 (c), ranks 10, 12 at operation 2 (b)"


def test_the_order_counts_and_so_does_the_number() -> None:
    assert differences("g", histories(["a", "b"], ["b", "a"]))
    assert differences("g", histories(["a"], ["a", "a"]))
    assert differences("g", histories(["ab", "c"], ["a", "bc"]))


def test_unpaired_messages_are_found() -> None:
    found = histories([], [])
    for text in ("x", "y"):
        found[0].sent.setdefault((1, 3), type(found[0].collective)()).add(text)
    found[1].received.setdefault((0, 3), type(found[0].collective)()).add("x")
    (sentence,) = differences("pp", found)
    assert "tag 3: rank 10 sent 2 messages to rank 11 (last: y), which received 1 (last: x)" in sentence
    found[1].received[0, 3].add("y")
    assert differences("pp", found) == []
    found[1].received.setdefault((0, 4), type(found[0].collective)()).add("z")
    (sentence,) = differences("pp", found)
    assert "rank 10 sent 0 messages to rank 11 (last: nothing yet), which received 1" in sentence


def test_a_journal_keeps_the_last_operations_and_knows_what_is_open() -> None:
    clock = Clock()
    journal = Journal(clock)
    entries = [journal.begin("tp", f"operation {number}") for number in range(LAST_OPERATIONS + 6)]
    assert journal.waiting
    clock.now += 2.0
    for entry in entries:
        journal.end(entry)
    assert not journal.waiting
    lines = journal.lines()
    assert len(lines) == LAST_OPERATIONS
    assert "operation 6 " in lines[0]
    assert lines[-1] == f"    2.000 s ago  tp: operation {LAST_OPERATIONS + 5}  2000.000 ms"
    clock.now += 3.0
    assert journal.idle() == 3.0
    journal.phase = "saving"
    assert journal.idle() == 0.0


def reports(*idle: float) -> dict[int, Report]:
    return {rank: Report(f"rank {rank}", "forward", seconds, [f"op {rank}"]) for rank, seconds in enumerate(idle)}


def test_a_job_is_stuck_when_nobody_moves() -> None:
    assert is_stuck(reports(9.0, 5.0), 5.0)
    assert not is_stuck(reports(9.0, 4.9), 5.0)


def test_the_verdict_shows_everyone_and_names_those_who_differ_or_are_silent() -> None:
    found = histories(["a"], ["b"], ["a"])
    told = {
        rank: Report(f"rank {rank}", "forward", 7.0, [f"last of {rank}"], {"tp (0, 1, 2)": found[rank]})
        for rank in range(3)
    }
    text = verdict(told, 4, 5.0)
    assert all(f"[rank {rank}]   last of {rank}" in text for rank in range(3))
    assert "no answer from rank 3" in text
    assert "group tp (0, 1, 2): rank 11 at operation 1 (b)" in text
    assert "all histories agree" in verdict(reports(6.0, 6.0), 2, 5.0)


def test_a_report_travels_and_is_short_while_the_rank_moves() -> None:
    clock = Clock()
    journal = Journal(clock)
    journal.histories["tp"] = History((0,), 0)
    journal.end(journal.begin("tp", "all_reduce"))
    assert report_of(journal, 5.0).lines == []
    clock.now += 6.0
    report = pickle.loads(pickle.dumps(report_of(journal, 5.0)))
    assert report.idle == 6.0
    assert len(report.lines) == 1
    assert list(report.histories) == ["tp"]
