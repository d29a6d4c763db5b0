"""The report: one page that loads nothing, with a section for each kind of result."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench import _record, report
from bench._svg import WIDTH, Bar, Point, bars, roofline
from tests.bench.commands import measure

VOID = {"meta", "br"}


class Balanced(HTMLParser):
    """Every element that opens closes, and nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href"} & {name for name, _ in attributes}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def summary(value: float) -> dict[str, Any]:
    return _record.summary([value, 2 * value])


def step_result() -> dict[str, Any]:
    figures = {
        "tokens_per_s": 200.0,
        "mfu": 0.5,
        "peak_rss_bytes": 10**9,
        "python_share": 0.01,
        "ops": {"mlp.forward": 1.0, "a<b": 0.5},
        "step_seconds": summary(1.0),
        "tokens": 256,
    }
    peers = {"torch_eager": figures | {"tokens_per_s": 100.0}, "torch_compile": {"skipped": "no compiler"}}
    return {
        **{
            "bench": "step",
            "machine": {"cpu": "x"},
            "options": {"model": "gpt2-124m", "batch": 4, "seq": 256, "dtype": "fp32"},
            "valid": False,
            "spell": "probes differ",
        },
        **{"validity": "torch_eager reached 1 %", "peers": peers},
        "ratios": {"torch_eager": {"speed": summary(2.0) | {"median": 2.0}, "memory": 0.7}},
        **figures,
    }


def test_every_kind_has_its_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.kernels.VOCABULARY", 500)
    measure("peak", tmp_path, "--threads", "1", "--mebibytes", "1", "--rounds", "1")
    measure("kernels", tmp_path, "--rounds", "1", "--rows", "2", "--isa", "scalar", "--threads", "1")
    measure("loader", tmp_path, "--tokens", "5000", "--rounds", "1", "--batch", "1", "--seq", "16")
    machine = {"cpu": "x"}
    rates = {"pytrain": summary(2.0), "torch": summary(1.0)}
    made: list[dict[str, Any]] = [
        step_result(),
        {"bench": "attention", "machine": machine, "cases": [
            {"dtype": "fp32", "length": 9, "head_size": 4, "gflops": summary(1.0), "torch_gflops": summary(2.0)}]},
        {"bench": "peers", "machine": machine, "cases": [
            {"dtype": "fp32", "name": "qkv dX", "unit": "GFLOP/s", "rate": rates}]},
        {"bench": "matmul", "machine": machine, "cases": [
            {"name": "qkv dX", "gflops": summary(90.0), "threads": 1, "ratio": {"numpy": summary(1.5)}}],
            "options": {"dtype": "bf16"}, "probes": [{"threads": 1, "spell": "probes <differ>"}],
            "weighted": [{"threads": 1, "peak_gflops": 200.0, "share": 0.87, "best_share": 0.88, "least": "qkv dX",
                          "least_share": 0.81}]},
        {"bench": "collectives", "machine": machine, "cases": [
            {"ranks": 2, "bytes": 1024, "seconds": {"MPI": summary(1e-6), "ring": summary(2e-6)}}]},
        {"bench": "scaling", "machine": machine, "cases": [
            {"name": "14m dp", "target": 0.9, "ratios": {"ranks": summary(0.95), "in-turn": summary(0.9)}}]},
        {"bench": "mystery", "machine": machine},
    ]  # fmt: skip
    for found in made:
        text = json.dumps({"format": _record.FORMAT} | found)
        (tmp_path / f"{found['bench']}.json").write_text(text, encoding="utf-8")
    (tmp_path / "old.json").write_text(json.dumps(step_result() | {"format": 1}), encoding="utf-8")
    files = [str(path) for path in sorted(tmp_path.glob("*.json"))]
    out = tmp_path / "report.html"
    report.main([*files, "--out", str(out)])
    output = capsys.readouterr().out
    assert "mystery.json: left out" in output
    assert "old.json: left out, since it has format 1" in output
    text = out.read_text(encoding="utf-8")
    page = Balanced()
    page.feed(text)
    page.close()
    assert page.open == []
    assert {"svg", "rect", "circle", "table"} <= page.seen
    assert "http" not in text
    for name in report.SECTIONS:
        assert f"<code>bench.{name}</code></h2>" in text
    assert "Invalid: torch_eager reached 1 %" in text
    assert "1 thread, 256 KiB" in text
    assert "probes &lt;differ&gt;" in text
    assert "weighted by FLOPs over a step 87.0% (best runs 88.0%), least qkv dX 81.0%" in text
    assert "68% (135), 2.25 x numpy" in text
    assert "torch_compile: skipped: no compiler" in text
    assert "a&lt;b" in text
    assert "<td>gpt2-124m 4 x 256 fp32, torch_eager</td><td>100</td><td>50.0%</td><td>1.00 GB</td>" in text
    assert "<td>2.00 x (invalid)</td><td>0.70 x</td>" in text
    assert "<h2>Roofline</h2>" in text


def test_bars_are_to_scale() -> None:
    drawn = bars([Bar("half", 50.0, 40.0, 60.0, "50"), Bar("whole", 100.0, 100.0, 100.0, "100")], ceiling=100.0)
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', drawn)]
    assert widths[1] == pytest.approx(2 * widths[0])
    assert widths[1] < WIDTH
    assert "stroke-dasharray" in drawn


def test_a_bar_far_beyond_the_ceiling_is_cut_off() -> None:
    drawn = bars([Bar("far", 40.0, 30.0, 50.0, "4000 %"), Bar("whole", 1.0, 1.0, 1.0, "100 %")], ceiling=1.0)
    far, whole = (float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', drawn))
    assert far == pytest.approx(1.6 * whole, rel=1e-3)


def test_ops_too_small_to_see_are_one_bar() -> None:
    drawn = report._op_bars({"head.forward": 2.0, "mlp.forward": 1.0, "loss.forward": 1e-5, "embed.forward": 2e-5})
    assert [bar.label for bar in drawn] == ["head.forward", "mlp.forward", "2 others"]
    assert sum(bar.value for bar in drawn) == pytest.approx(3.00003)


def test_the_roof_bends_where_the_ceilings_meet() -> None:
    drawn = roofline([Point("below", 1.0, 5.0), Point("on the ridge", 10.0, 100.0)], peak_gflops=100, gigabytes=10)
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    ridge = re.search(r"L([\d.]+) ([\d.]+)H", drawn)
    assert ridge is not None
    assert places[1] == (float(ridge[1]), float(ridge[2]))
    assert places[0][0] < places[1][0]
    assert places[0][1] > places[1][1]  # y counts downwards
