"""Products by rocBLAS, a stand-in for which the shim's build links: `run.hip_products = "rocblas"`.

The stand-in (tests/hip/shim/rocblas) does in float64 what the library's documentation says, columns first, and
refuses what the library refuses. The real one was never linked.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytrain import _native
from pytrain.checkpoint import Checkpoint
from pytrain.errors import UserError
from pytrain.native import open_device
from pytrain.train import train
from tests import runs
from tests.native import test_matmul as native_tests
from tests.native.arrays import empty, stored, values

SHIM: Any = getattr(_native, "hip_shim", None)
TYPES = ["fp32", "bf16", "fp16"]


@pytest.fixture
def rocblas(monkeypatch: pytest.MonkeyPatch) -> _native.Device:
    """A HIP device that multiplies by it; the CPU's tests get it as theirs."""
    device = _native.hip_device(0, rocblas=True)
    monkeypatch.setattr(native_tests, "CpuDevice", lambda isa, threads: device)
    return device


def calls() -> int:
    """Of gemm_ex, since the beginning."""
    return int(SHIM.rocblas_products())


@pytest.mark.usefixtures("rocblas")
@pytest.mark.parametrize(("transpose_a", "transpose_b"), native_tests.TRANSPOSES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_every_transpose_and_size(transpose_a: bool, transpose_b: bool, accumulate: bool) -> None:
    before = calls()
    native_tests.test_every_transpose_and_size("rocblas", transpose_a, transpose_b, accumulate)
    assert calls() > before


@pytest.mark.usefixtures("rocblas")
@pytest.mark.parametrize(
    ("type_a", "type_b", "type_c"),
    [types for types in itertools.product(TYPES, repeat=3) if len({*types} - {"fp32"}) == 1],
)
@pytest.mark.parametrize(("transpose_a", "transpose_b"), native_tests.TRANSPOSES)
def test_storage_types(type_a: str, type_b: str, type_c: str, transpose_a: bool, transpose_b: bool) -> None:
    """Operands of two types are our own kernel's: the library has no form for them."""
    before = calls()
    native_tests.test_storage_types("rocblas", type_a, type_b, type_c, transpose_a, transpose_b)
    assert (calls() > before) == (type_a == type_b)


@pytest.mark.usefixtures("rocblas")
@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_16_bit_results_are_rounded_once(half: str) -> None:
    native_tests.test_16_bit_results_are_rounded_once("rocblas", half)


@pytest.mark.usefixtures("rocblas")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("with_bias", "with_residual", "with_activation"), list(itertools.product([False, True], repeat=3))
)
def test_epilogue(dtype: str, with_bias: bool, with_residual: bool, with_activation: bool) -> None:
    before = calls()
    native_tests.test_epilogue("rocblas", dtype, with_bias, with_residual, with_activation)
    assert calls() > before


@pytest.mark.parametrize(("transpose_a", "transpose_b"), [(False, True), (True, False)])
def test_sums_go_through_the_workspace_some_rows_at_a_time(
    rocblas: _native.Device, random: np.random.Generator, transpose_a: bool, transpose_b: bool
) -> None:
    """8,192 sums a row: 440 rows of them fill the workspace, so that 450 rows take two calls."""
    m, n, k = 450, 8192 - 5, 3
    a = stored(random.normal(size=(k, m) if transpose_a else (m, k)), "bf16")
    b = stored(random.normal(size=(n, k) if transpose_b else (k, n)), "bf16")
    bias, residual = stored(random.normal(size=n), "bf16"), stored(random.normal(size=(m, n)), "bf16")
    c, before = empty((m, n), "bf16"), calls()
    rocblas.matmul(c, a, b, transpose_a=transpose_a, transpose_b=transpose_b, bias=bias, residual=residual)
    assert calls() - before == 2
    left, right = values(a, "bf16"), values(b, "bf16")
    exact = (left.T if transpose_a else left) @ (right.T if transpose_b else right)
    exact += values(bias, "bf16") + values(residual, "bf16")
    assert np.max(np.abs(values(c, "bf16") - exact) / np.maximum(np.abs(exact), 1e-2)) <= 2**-8


def test_a_run_of_the_trainer(tmp_path: Path) -> None:
    """As on the CPU; the checkpoint says who multiplied, and who goes on otherwise is told."""
    corpora = runs.make_corpora(tmp_path / "corpora")
    losses: dict[str, list[float]] = {}
    for name, keys in {"cpu": {"run__device": "cpu"}, "hip": {"run__hip_products": "rocblas"}}.items():
        before = calls()
        config = runs.configuration(
            corpora, tmp_path / name, **{"run__steps": 3, "run__device": "hip", "checkpoint__every": 3} | keys
        )
        runs.quiet_train(config)
        losses[name] = [line["loss"] for line in runs.timeless_metrics(tmp_path / name) if line.get("loss")]
        assert (calls() > before) == (name == "hip")
    assert len(losses["cpu"]) == 3
    assert losses["hip"] == pytest.approx(losses["cpu"], rel=2e-6)
    record = Checkpoint.open(tmp_path / "hip").state["record"]["native"]
    assert record["blocking"].endswith(", products of the GPU by rocBLAS 0.0.0-shim")
    display = runs.Quiet()
    train(runs.configuration(corpora, tmp_path / "hip", run__steps=4, run__device="hip"), "auto", display)
    assert [line for line in display.lines if "rocBLAS 0.0.0-shim and is" in line]


def test_who_asks_for_it_gets_it() -> None:
    device, before = open_device("hip", hip_products="rocblas"), calls()
    device.matmul(empty((2, 2), "fp32"), np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32))
    assert calls() == before + 1
    device = open_device("hip")
    device.matmul(empty((2, 2), "fp32"), np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32))
    assert calls() == before + 1


def test_it_is_for_gpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'run.hip_products "rocblas" is about products on a GPU'):
        runs.configuration(runs.Corpora(tmp_path), tmp_path / "run", run__hip_products="rocblas")
