"""The drawings of a schedule."""

from xml.etree import ElementTree

import pytest

from pytrain.__main__ import main
from pytrain.errors import ExitCode
from pytrain.schedule import (
    Costs,
    Kind,
    Lowered,
    Report,
    check,
    forward_only_pipeline,
    interleaved_one_f_one_b,
    lower,
    one_f_one_b,
    zero_bubble,
)
from pytrain.schedule.timeline import Row, legend, summary, svg, text_blocks

SVG = "{http://www.w3.org/2000/svg}"


def lines(block: list[Row]) -> list[str]:
    return ["".join(piece.text for piece in row).rstrip() for row in block]


def checked(lowered: Lowered) -> tuple[Lowered, Report]:
    return lowered, check(lowered)


def test_text() -> None:
    (block,) = text_blocks(*checked(lower(one_f_one_b(2, 3))))
    assert lines(block) == [
        "rank 0 | F0 F1       B0--- F2 B1---    B2---",
        "rank 1 |    F0 B0--- F1 B1--- F2 B2---",
    ]


def test_text_of_chunks() -> None:
    (block,) = text_blocks(*checked(lower(interleaved_one_f_one_b(2, 2, 1))))
    assert lines(block) == [
        "rank 0 | F0.0      F0.1                B0.1-----           B0.0-----",
        "rank 1 |      F0.0      F0.1 B0.1-----           B0.0-----",
    ]


def test_pieces_carry_the_kind_for_the_colour() -> None:
    (block,) = text_blocks(*checked(lower(zero_bubble(2, 2))))
    for row in block:
        for piece in row[1:]:
            assert (piece.kind is None) == (piece.text.strip() == "")
            assert piece.kind is None or piece.text.startswith(piece.kind.value)
    kinds = [piece.kind for piece in block[1] if piece.kind]
    assert kinds[:3] == [Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.FORWARD]


@pytest.mark.parametrize("width", [1, 12, 20, 33, 50, 1000])
def test_narrow_terminals_get_blocks(width: int) -> None:
    lowered, report = checked(lower(one_f_one_b(3, 5)))
    (whole,) = text_blocks(lowered, report)
    head = len("rank 0 | ")
    blocks = text_blocks(lowered, report, width)
    for rank, row in enumerate(whole):
        parts = ["".join(piece.text for piece in block[rank]) for block in blocks]
        assert all(part.startswith(f"rank {rank} | ") for part in parts)
        assert all(len(part) <= max(width, head + 3) for part in parts)
        assert "".join(part[head:] for part in parts) == "".join(piece.text for piece in row)[head:]


def test_columns_line_up_with_any_cost() -> None:
    lowered = lower(one_f_one_b(3, 4))
    report = check(lowered, Costs(forward=0.5, backward=1.25, communication=0.3))
    (block,) = text_blocks(lowered, report)
    assert len({sum(len(piece.text) for piece in row) for row in block}) == 1
    for text in lines(block):
        for microbatch in range(4):
            assert text.count(f"F{microbatch} ") == text.count(f"B{microbatch}") == 1


def test_legend_and_summary() -> None:
    lowered, report = checked(lower(zero_bubble(2, 4)))
    assert legend(lowered) == (
        "F forward, I backward, input gradients, W backward, weight gradients; then micro-batch"
    )
    assert summary(lowered, report) == [
        "zero-bubble: 2 ranks, 4 micro-batches",
        "time 13, of which 12 computing: bubble 8.3% of the work",
        "micro-batches kept at most, by lifetime (summed over the rank's stages); slots of each stage:",
        "  rank  F to B  F to W  I to W  slots",
        "     0       2       2       1  2",
        "     1       1       2       2  2",
    ]
    lowered, report = checked(lower(interleaved_one_f_one_b(2, 2, 2)))
    assert legend(lowered).endswith("micro-batch.chunk of the rank")
    assert summary(lowered, report)[0] == "interleaved: 2 ranks of 2 stages, 2 micro-batches"
    lowered, report = checked(lower(forward_only_pipeline(1, 1)))
    assert summary(lowered, report)[0] == "forward-only: 1 rank, 1 micro-batch"


@pytest.mark.parametrize("lowered", [lower(zero_bubble(3, 4)), lower(interleaved_one_f_one_b(2, 3, 4))], ids=str)
def test_svg(lowered: Lowered) -> None:
    report = check(lowered)
    root = ElementTree.fromstring(svg(lowered, report))
    assert root.tag == f"{SVG}svg"
    boxes = [box for box in root.iter(f"{SVG}rect") if box.find(f"{SVG}title") is not None]
    spans = [span for spans in report.spans for span in spans]
    assert len(boxes) == len(spans)
    unit = float(boxes[0].attrib["width"]) / (spans[0].end - spans[0].start)
    left = float(boxes[0].attrib["x"]) - spans[0].start * unit
    for box, span in zip(boxes, spans, strict=True):
        assert float(box.attrib["x"]) == pytest.approx(left + span.start * unit)
        assert float(box.attrib["width"]) == pytest.approx((span.end - span.start) * unit)
        title = box.findtext(f"{SVG}title") or ""
        assert f"of micro-batch {span.action.microbatch} on stage {span.action.stage}, " in title
    rows = {box.attrib["y"] for box in boxes}
    assert len(rows) == len(lowered.ranks)
    written = {text.text for text in root.iter(f"{SVG}text")}
    assert {f"rank {rank}" for rank in range(len(lowered.ranks))} | set(summary(lowered, report)[:2]) <= written
    # Nothing is drawn outside.
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for box in root.iter(f"{SVG}rect"):
        assert float(box.get("x", 0)) + float(box.attrib["width"]) <= width
        assert float(box.get("y", 0)) + float(box.attrib["height"]) <= height


# --- pytrain plan ---------------------------------------------------------------------------------------


def test_plan(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    picture = f"{tmp_path}/plan.svg"
    arguments = ["--schedule", "1f1b", "--stages", "2", "--micro-batches", "3", "--svg", picture]
    assert main(["plan", *arguments]) == ExitCode.OK
    shown = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in shown[:3]] == [
        "rank 0 | F0 F1       B0--- F2 B1---    B2---",
        "rank 1 |    F0 B0--- F1 B1--- F2 B2---",
        "",
    ]
    assert shown[3] == "F forward, B backward; then micro-batch"
    assert shown[5] == "time 12, of which 9 computing: bubble 33.3% of the work"
    assert ElementTree.parse(picture).getroot().tag == f"{SVG}svg"


def test_plan_of_chunks(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--schedule", "interleaved", "--stages", "2", "--chunks", "2", "--micro-batches", "4"]
    assert main(["plan", *arguments]) == ExitCode.OK
    assert "bubble 12.5% of the work" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "2f2b"], 'schedule must be one of gpipe, 1f1b, interleaved, zero-bubble, not "2f2b"'),
        (["--schedule", "gpipe", "--chunks", "2"], "schedule gpipe has one chunk per rank, not 2"),
        (
            ["--schedule", "gpipe", "--svg", "/nowhere/plan.svg"],
            "/nowhere/plan.svg cannot be written: No such",
        ),
        (["--schedule", "gpipe", "--stages", "0"], "'--stages'"),
    ],
)
def test_plan_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--stages", "2", "--micro-batches", "3", *arguments]) == ExitCode.BAD_INPUT
    assert message in capsys.readouterr().err
