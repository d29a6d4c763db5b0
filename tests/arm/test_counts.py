"""What is executed on an A64FX: instructions of whole products, and every kernel of the table in training steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.arm.counts import SHAPES, Counter, share_of_peak, short, total
from tests.arm.machine import Machine
from tests.runs import configuration, make_corpora, write_toml

ROW_KERNELS = {
    *("add", "scale", "gelu_forward", "gelu_backward", "swiglu_forward", "swiglu_backward", "rope", "dot", "adamw"),
    *("layernorm_forward", "layernorm_backward", "rmsnorm_forward", "rmsnorm_backward"),
    *("maximum", "exp_sum", "softmax_backward", "sum_squares"),
}
TILE_KERNELS = {"matmul_tile", "softmax_columns_tile", "scale_columns_tile"}
STORAGE_KERNELS = {"widen_row", "narrow_row", "pack_along", "pack_across"}


@pytest.fixture(scope="module")
def counter(arm: Machine, tmp_path_factory: pytest.TempPathFactory) -> Counter:
    return Counter(arm, tmp_path_factory.mktemp("counts"))


@pytest.mark.parametrize("name", ["square of 256", "qkv, tp 32", "qkv, tp 32, weights", "qkv, tp 32, input"])
def test_whole_products_come_near_the_peak(counter: Counter, name: str) -> None:
    m, n, k, kind = SHAPES[name]
    counts = counter.product(m, n, k, kind)
    useful = m * n * k // 16
    assert useful <= total(counts).multiply_adds <= 1.06 * useful, "tiles at the edges are computed whole"
    assert share_of_peak(counts, m, n, k) >= 0.8


def test_every_kernel_of_the_table_is_called(counter: Counter, tmp_path: Path) -> None:
    """Over a run of each family and storage type, and none of another table."""
    corpora = make_corpora(tmp_path / "corpora")
    called: set[str] = set()
    for family, dtype in (("gpt2", "fp16"), ("llama", "bf16"), ("llama", "fp32")):
        changes = {"precision__dtype": dtype, "run__steps": 1}
        toml = write_toml(
            configuration(corpora, tmp_path / f"{family}-{dtype}", family, **changes),
            tmp_path / f"{family}-{dtype}.toml",
        )
        counts = counter.run("-m", "pytrain", "train", toml)
        called |= {short(name) for name in counts if re.search(r"cpu::(sve|neon|scalar)\w*::", name)}
    assert [name for name in called if "sve::" not in name] == []
    expected = {f"sve::{name}_row" for name in ROW_KERNELS} | {f"sve::{name}" for name in TILE_KERNELS}
    expected |= {f"sve::{name}<sve::{storage}>" for name in STORAGE_KERNELS for storage in ("Fp32", "Bf16", "Fp16")}
    called = {name.removeprefix("void ") for name in called}
    assert expected - called == set()
