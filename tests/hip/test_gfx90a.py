"""The kernels as compiled for MI250X: what the compiler and the assembly say, and that the suite ran all of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import hip
from pytrain import _native
from tests.hip.conftest import LAST

MATRIX = ("matmul_kernel", "attention_forward_kernel", "attention_dq_kernel", "attention_dkv_kernel")
LDS_OF_A_COMPUTE_UNIT = 65536
REGISTERS_OF_A_SIMD_LANE = 512


@pytest.fixture(scope="session")
def kernels() -> list[hip.Kernel]:
    """All of them; compiled once, and again only after a change."""
    return hip.compile_all(hip.BUILD)


def test_kernels_with_products_use_the_matrix_units(kernels: list[hip.Kernel]) -> None:
    for kernel in kernels:
        name = kernel.kernel.split()[0]
        assert (kernel.mfma > 0) == (name in MATRIX), kernel
    assert {kernel.kernel.split()[0] for kernel in kernels} >= set(MATRIX)
    files = "".join(hip.compile_file(path, hip.BUILD).read_text() for path in hip.kernel_files())
    for instruction in ("32x32x8bf16_1k", "32x32x8f16", "32x32x2f32"):
        assert f"v_mfma_f32_{instruction}" in files


def test_nothing_is_spilled_to_memory(kernels: list[hip.Kernel]) -> None:
    assert [kernel.kernel for kernel in kernels if kernel.scratch_bytes] == []


def test_blocks_fit_as_often_as_stated(kernels: list[hip.Kernel]) -> None:
    """Occupancy counts registers and LDS: a wave is one of four of its block, one on each SIMD."""
    for kernel in kernels:
        assert 0 < kernel.occupancy * kernel.lds_bytes <= LDS_OF_A_COMPUTE_UNIT or kernel.lds_bytes == 0, kernel
        registers = (kernel.vgprs + 3) // 4 * 4 + kernel.agprs
        assert kernel.occupancy * registers <= REGISTERS_OF_A_SIMD_LANE, kernel
        # What the files promise: two blocks of the product on a compute unit; rows and elements fill theirs.
        least = {"matmul_kernel": 2}.get(kernel.kernel.split()[0], 1 if kernel.kernel.startswith("attention") else 6)
        assert kernel.occupancy >= least, kernel


def test_memory_is_read_by_16_bytes(kernels: list[hip.Kernel]) -> None:
    narrow = {"fill_kernel", "fill_normal_kernel", "norm_sums_kernel", "bias_sums_kernel", "add_chunks_kernel"}
    narrow |= {"embed_backward_kernel", "loss_forward_kernel", "finish_sum_kernel", "finish_norm_kernel"}
    for kernel in kernels:
        assert (kernel.wide_loads > 0) == (kernel.kernel.split()[0] not in narrow), kernel
        assert kernel.flat == 0, kernel


def test_the_product_is_bound_by_the_matrix_units(kernels: list[hip.Kernel]) -> None:
    """By llvm-mca: one wave alone keeps its matrix unit busy at least 95 % of the time; a SIMD holds two."""
    products = [kernel for kernel in kernels if kernel.kernel.startswith("matmul_kernel")]
    assert len(products) == 12
    for kernel in products:
        assert kernel.alone is not None
        assert kernel.alone >= 0.95, kernel
        assert kernel.occupancy == 2, kernel


def test_the_report(kernels: list[hip.Kernel], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hip.json"
    assert hip.main(["--json", str(path), "--build", str(hip.BUILD)]) == 0
    rows = json.loads(path.read_text())
    keys = {"kernel", "vgprs", "agprs", "lds_bytes", "scratch_bytes", "occupancy", "mfma", "mfma_share"}
    assert all(set(row) == keys for row in rows)
    assert len(rows) == len({row["kernel"] for row in rows}) == len(kernels)
    printed = capsys.readouterr().out
    assert re.search(r"^matmul_kernel bf16 along across .* MFMA ", printed, re.MULTILINE)
    assert re.search(r"^adamw_kernel .* memory ", printed, re.MULTILINE)


def test_every_kernel_of_the_object_ran(kernels: list[hip.Kernel]) -> None:
    """Last of all: a kernel that the GPU would run, but the suite has not, is one that nobody has checked."""
    assert test_every_kernel_of_the_object_ran.__name__ == LAST
    shim: Any = _native.hip_shim  # type: ignore[attr-defined]
    launched = set(shim.launched_kernels())
    compiled = {kernel.symbol for kernel in kernels}
    assert len(compiled) > 70
    assert compiled - launched == set()
    assert {name for name in launched - compiled if "shim" not in name} == set()
