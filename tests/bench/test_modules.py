"""Each benchmark in its shortest form: it runs, and its JSON has what is promised. No timing is asserted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from bench import _record
from tests.bench.commands import check_summary, measure


def test_peak(tmp_path: Path) -> None:
    found = measure("peak", tmp_path, "--threads", "1", "--mebibytes", "1", "--rounds", "2")
    (case,) = found["cases"]
    assert case["threads"] == 1
    for name in ("fp32_gflops", "bf16_gflops", "read_gb_s", "copy_gb_s"):
        check_summary(case[name], 2)
    assert [row["bytes_per_thread"] for row in case["sizes"]] == [256 * 2**10]  # the others exceed a mebibyte
    check_summary(case["sizes"][0]["copy_gb_s"], 2)
    assert found["machine"]["threads"] == 1


def test_copies_are_of_what_threads_touch_together() -> None:
    from bench.peak import copy_by_size

    copied: list[int] = []

    class Device:
        threads = 2

        def fill(self, array: np.ndarray, value: float) -> None:
            array.fill(value)

        def copy(self, destination: np.ndarray, source: np.ndarray) -> None:
            copied.append(destination.nbytes + source.nbytes)

    assert copy_by_size(Device(), 4096, runs=1) > 0  # type: ignore[arg-type]
    assert set(copied) == {2 * 4096}


def test_matmul(tmp_path: Path) -> None:
    found = measure("matmul", tmp_path, "--threads", "1", "--runs", "2", "--rows", "8")
    names = [case["name"] for case in found["cases"]]
    assert len(names) == len(set(names)) == 15
    assert {"qkv forward", "mlp.down dX", "head dW"} <= set(names)
    (probe,) = found["probes"]
    peak = probe["peak_gflops"]["max"]
    for case in found["cases"]:
        check_summary(case["gflops"], 2)
        check_summary(case["seconds"], 2)
        assert case["share"] == pytest.approx(case["gflops"]["median"] / peak)
        assert case["peers"] == case["ratio"] == {}
    (whole,) = found["weighted"]
    layer = 8 * 768 * 768 * (3 + 1 + 4 + 4)  # rows by inputs by outputs of a layer's four matrices
    assert whole["flops"] == pytest.approx(3 * 2 * (12 * layer + 8 * 768 * 50257))
    seconds = sum(case["repeats"] * case["seconds"]["median"] for case in found["cases"])
    assert whole["share"] == pytest.approx(whole["flops"] / seconds / 1e9 / peak)
    assert whole["least_share"] == min(case["share"] for case in found["cases"])
    for name in ("read_gb_s", "cache_gb_s", "peak_gflops"):
        check_summary(probe[name], 6)  # before and after each of five matrices
    assert found["machine"]["threads"] == 1


def test_products_are_called_as_a_step_calls_them() -> None:
    from bench._products import layers, products
    from bench.matmul import step_head_rows

    called = {product.name: product for layer in layers() for product in products(layer, 1024)}
    epilogues = {name: set(product.epilogue) for name, product in called.items() if product.epilogue}
    assert epilogues == {
        "qkv forward": {"bias"},
        "attention.out forward": {"bias", "residual"},
        "mlp.up forward": {"bias", "activated"},
        "mlp.down forward": {"bias", "residual"},
    }
    assert [name for name, product in called.items() if product.accumulate] == ["head dW"]
    assert {name for name, product in called.items() if product.fp32_result} == {
        "head forward",
        *(name for name in called if name.endswith("dW")),
    }
    assert called["mlp.down dX"][2:6] == ("NT", 1024, 3072, 768)
    rows = step_head_rows(1024, "fp32")
    assert rows * 50257 * 4 <= 128 * 2**20 < (rows + 1024) * 50257 * 4  # what a stage's arena has room for
    assert step_head_rows(8, "bf16") == 8


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_everybody_computes_the_same_product(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import _products
    from pytrain.native import native

    monkeypatch.setattr(_products, "last_cache_bytes", lambda: 20_000)
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing to compare with")
    device = native().CpuDevice(threads=1)
    for kind in ("NN", "NT", "TN"):
        product = _products.Product("x", kind, kind, 9, 21, 33, fp32_result=False)
        rotation = _products.Rotation(product, dtype)
        sets = rotation.sets
        assert len(sets) == 3 * 20_000 // sum(array.nbytes for array in sets[0][:3]) + 1 > 2
        assert all(array.ctypes.data % 64 == 0 for one in sets for array in one[:3])
        calls = [rotation.own_call(device), rotation.torch_call(torch)]
        if dtype == "fp32":
            calls.append(rotation.numpy_call())
        for operands in sets:
            operands.c[...] = 0
        for call in calls:
            call()  # each takes the next set
        answers = [_wide(one.c) for one in sets[: len(calls)]]
        a, b = (_wide(array).astype(np.float64) for array in sets[0][1:3])
        reference = (a.T if kind[0] == "T" else a) @ (b.T if kind[1] == "T" else b)
        for answer in answers:
            assert np.abs(answer - reference).max() < (1e-4 if dtype == "fp32" else 0.01) * np.abs(reference).max()
        assert not _wide(sets[len(calls)].c).any()


def _wide(values: np.ndarray) -> np.ndarray:
    return values.view(ml_dtypes.bfloat16).astype(np.float32) if values.dtype == np.uint16 else values


def test_matmul_beside_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    options = ("--threads", "1", "--runs", "2", "--rows", "4", "--peers", "numpy", "--peers", "torch")
    found = measure("matmul", tmp_path, *options)
    assert "OPENBLAS_CORETYPE is left out" in capfd.readouterr().out
    torch = _record.installed("torch") != _record.NOT_INSTALLED
    for case in found["cases"]:
        assert set(case["ratio"]) == {"numpy", *(["torch"] if torch else [])}
        assert case["epilogue"] == []
        for who, ratio in case["ratio"].items():
            check_summary(ratio, 2)
            own, theirs = case["gflops"]["values"], case["peers"][who]["values"]
            assert ratio["values"] == pytest.approx([mine / other for mine, other in zip(own, theirs, strict=True)])
    name, least = found["weighted"][0]["least_ratio_numpy"]
    assert least == min(case["ratio"]["numpy"]["median"] for case in found["cases"])
    assert name in {case["name"] for case in found["cases"]}


def test_matmul_takes_turns() -> None:
    from bench.matmul import turns

    order: list[str] = []
    times = turns({name: (lambda name=name: order.append(name)) for name in "AB"}, 2, settle=0.0)
    assert "".join(order) == "AB" + 2 * "AABB"  # each timed call follows one of its own that is not
    assert [len(seconds) for seconds in times.values()] == [2, 2]
    order.clear()
    turns({"A": lambda: order.append("A")}, 3)
    assert order == list("AAAA")


def test_probes_that_differ_are_a_sentence() -> None:
    from bench._probe import Reading, mean_of, spell

    assert spell([Reading(100.0, 40.0, 200.0), Reading(114.0, 35.0, 180.0)]) is None
    found = spell([Reading(100.0, 40.0, 200.0), Reading(101.0, 30.0, 180.0)])
    assert found is not None
    assert "reading memory from 30.0 to 40.0 GB/s" in found
    assert "arithmetic" not in found
    both = spell([Reading(100.0, 40.0, 204.0), Reading(80.0, 40.0, 161.0)])
    assert both is not None
    assert "arithmetic from 80.0 to 100.0 GFLOP/s, copying in a cache from 161.0 to 204.0 GB/s" in both
    assert mean_of(Reading(1.0, 2.0, 3.0), Reading(3.0, 6.0, 5.0)) == Reading(2.0, 4.0, 4.0)


def test_the_last_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import _probe

    monkeypatch.setattr(_probe, "CACHES", tmp_path)
    assert _probe.last_cache_bytes() == 32 * 2**20  # a kernel that shows none
    for number, size in enumerate(("48K", "1M", "98304K")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(f"{size}\n", encoding="ascii")
    assert _probe.last_cache_bytes() == 96 * 2**20


@pytest.fixture
def small_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.kernels.VOCABULARY", 500)


@pytest.mark.usefixtures("small_vocabulary")
def test_kernels_have_their_ceilings(tmp_path: Path) -> None:
    found = measure("kernels", tmp_path, "--rounds", "1", "--rows", "4", "--isa", "scalar")
    kernels = {row["name"]: row for row in found["kernels"]}
    wanted = {"layernorm backward", "rmsnorm forward", "swiglu backward", "rope", "embedding backward", "adamw"}
    assert wanted | {"head statistics", "attention backward", "product x W^T"} <= set(kernels)
    for row in kernels.values():
        check_summary(row["rate"], 1)
        assert row["share"] == pytest.approx(row["rate"]["median"] / row["ceiling"])
    # 7 arrays of 4 x 4096 float32: weights, moments and gradient are read, all but the gradient written
    assert kernels["adamw"]["bytes"] == 7 * 4 * 4096 * 4
    assert kernels["attention forward"]["unit"] == "GFLOP/s"


@pytest.mark.usefixtures("small_vocabulary")
def test_kernels_of_half_precision(tmp_path: Path) -> None:
    found = measure("kernels", tmp_path, "--rounds", "1", "--rows", "4", "--isa", "scalar", "--dtype", "fp16")
    kernels = {row["name"]: row for row in found["kernels"]}
    assert kernels["adamw"]["bytes"] == (7 * 4 + 2) * 4 * 4096  # and the fp16 weights are written
    assert kernels["residual add"]["bytes"] == 3 * 4 * 768 * 2


def test_attention(tmp_path: Path) -> None:
    options = ("--length", "33", "--length", "66", "--head-size", "16", "--rounds", "1", "--no-torch")
    found = measure("attention", tmp_path, *options)
    assert [(case["dtype"], case["length"]) for case in found["cases"]] == [
        *(("fp32", 33), ("fp32", 66), ("bf16", 33), ("bf16", 66))
    ]
    for case in found["cases"]:
        check_summary(case["gflops"], 1)
        assert case["extra_bytes"] > 0
        assert "ratio" not in case


def test_attention_beside_pytorch(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed: nothing to compare with")
    found = measure("attention", tmp_path, "--length", "40", "--head-size", "16", "--rounds", "2")
    assert found["torch"]
    for case, most in zip(found["cases"], (1e-5, 0.02), strict=True):
        check_summary(case["ratio"], 2)
        assert case["difference"] < most  # both compute the same thing


def test_attention_differs_where_the_output_does() -> None:
    from bench.attention import _difference

    ours = np.array([[1.0, 2.0]], np.float32)
    assert _difference(ours, ours) == 0
    assert _difference(ours[:, ::-1], ours) == 0.5


def test_loader(tmp_path: Path) -> None:
    found = measure("loader", tmp_path, "--tokens", "20000", "--rounds", "2", "--batch", "2", "--seq", "32")
    assert [case["what"] for case in found["cases"]] == [
        "one corpus",
        "one corpus, documents apart",
        "mixture, documents apart",
        "mixture, after a jump",
    ]
    for case in found["cases"]:
        check_summary(case["tokens_per_s"], 2)


def test_collectives(tmp_path: Path) -> None:
    found = measure("collectives", tmp_path, "--ranks", "2", "--largest", "1", "--rounds", "1")
    assert {case["ranks"] for case in found["cases"]} == {2}
    assert [case["bytes"] for case in found["cases"]][:2] == [1024, 4096]
    for case in found["cases"]:
        assert {"MPI", "auto", "direct", "ring"} <= set(case["seconds"])


def test_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    options = ("--tokens", "4", "--vocabulary", "64", "--rounds", "1", "--dtype", "fp32", "--threads", "1")
    found = measure("peers", tmp_path, *options)
    assert "OPENBLAS_CORETYPE is left out" in capfd.readouterr().out
    assert "OPENBLAS_CORETYPE" not in found["machine"]["environment"]
    assert len(found["cases"]) == 17
    for case in found["cases"]:
        assert "numpy" in case["ratio"]
        assert ("torch" in case["ratio"]) == found["torch"]


def test_peers_without_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("OMP_NUM_THREADS", "1"), ("OPENBLAS_NUM_THREADS", "1"), ("OPENBLAS_THREAD_TIMEOUT", "20")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.setattr(_record, "installed", lambda _name: _record.NOT_INSTALLED)
    options = ("--tokens", "2", "--vocabulary", "64", "--rounds", "1", "--dtype", "fp32", "--threads", "1")
    found = measure("peers", tmp_path, *options)
    assert not found["torch"]
    assert "torch: skipped: PyTorch is not installed" in capsys.readouterr().out


def test_wrong_input_is_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.report", str(tmp_path / "none.json")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == f"error: {tmp_path / 'none.json'} cannot be read: No such file or directory\n"


def test_turns_alternate() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "AB"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_record, "SAMPLE_SECONDS", 0.0)
        times = _record.alternate(calls, 3)
    assert order == list("AB" * 4)  # the first round is not counted
    assert [len(seconds) for seconds in times.values()] == [3, 3]


def test_summary_and_its_words() -> None:
    found = _record.summary([3.0, 1.0, 2.0])
    assert (found["median"], found["min"], found["max"]) == (2.0, 1.0, 3.0)
    assert _record.spread(found, unit=0.5) == "4.0 (2.0 to 6.0)"


def test_a_governor_that_is_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_record, "GOVERNOR", tmp_path / "none")
    assert _record.governor() == "unknown"
    (tmp_path / "none").write_text("performance\n")
    assert _record.governor() == "performance"


def test_everything_in_a_short_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from bench import __main__ as everything

    assert set(everything.SHORT) == {
        *("peak", "matmul", "kernels", "attention", "loader", "collectives", "scaling", "peers", "step")
    }
    options = ("--tokens", "20000", "--rounds", "1", "--batch", "2", "--seq", "32")
    monkeypatch.setitem(everything.SHORT, "loader", everything.SHORT["loader"]._replace(options=options))
    everything.command.main(["--only", "loader", "--out", str(tmp_path / "results")], standalone_mode=False)
    output = capfd.readouterr().out
    assert output.splitlines()[-1].startswith("loader")
    assert "tokens/s" in output.splitlines()[-1]
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"loader.json", "report.html"}
    monkeypatch.setitem(everything.SHORT, "loader", everything.SHORT["loader"]._replace(options=("--no-such",)))
    with pytest.raises(SystemExit):
        everything.command.main(["--only", "loader"], standalone_mode=False)
    assert "failed with status 2" in capfd.readouterr().out
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    everything.command.main(["--only", "scaling", "--out", str(tmp_path / "none")], standalone_mode=False)
    assert "scaling      skipped: two ranks beside each other need two cores" in capfd.readouterr().out
