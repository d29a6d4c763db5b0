"""What is executed on an A64FX: instructions of whole products, and every kernel of the table in training steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.arm.counts import Counter, Counts, others, share_of_peak, short, total
from tests.arm.machine import TRAIN, Machine
from tests.arm.shapes import CUT, Product, parts
from tests.runs import configuration, make_corpora, write_toml

RUNS = {("gpt2", "fp16"), ("llama", "bf16"), ("llama", "fp32")}
"""Of each family a run, and of each storage type."""
STORAGE = {"fp32": "Fp32", "bf16": "Bf16", "fp16": "Fp16"}
KERNELS = {
    *("add_row", "scale_row", "dot_row", "maximum_row", "exp_sum_row", "softmax_backward_row", "sum_squares_row"),
    *("matmul_tile", "softmax_columns_tile", "scale_columns_tile"),
}
STORED_KERNELS = {"widen_row", "narrow_row", "pack_along", "pack_across", "adamw_row"}
"""Written for each storage type; the others are called where a family has them."""
FAMILY_KERNELS = {
    "gpt2": {"gelu_forward_row", "gelu_backward_row", "layernorm_forward_rows", "layernorm_backward_rows"},
    "llama": {
        *("swiglu_forward_row", "swiglu_backward_row", "rope_row"),
        *("rmsnorm_forward_rows", "rmsnorm_backward_rows"),
    },
}


@pytest.fixture(scope="module")
def counter(arm: Machine, tmp_path_factory: pytest.TempPathFactory) -> Counter:
    return Counter(arm, tmp_path_factory.mktemp("counts"))


@pytest.fixture(scope="module")
def cut(counter: Counter) -> dict[str, Counts]:
    """All in one process: its start takes longer than most products."""
    return {product.name: counts for product, counts in zip(CUT, counter.products(CUT), strict=True)}


@pytest.mark.parametrize("product", CUT, ids=lambda product: product.name)
def test_whole_products_come_near_the_peak(cut: dict[str, Counts], product: Product) -> None:
    """At least 80 % for every shape whose dimensions are all 256 and more; tests/long has them in full."""
    counts = cut[product.name]
    useful = product.m * product.n * product.k * product.item // 64
    assert useful <= total(counts).multiply_adds <= 1.06 * useful, "tiles at the edges are computed whole"
    assert others(total(counts)) >= 0.5, "14 loads for 24 multiply-adds at the least"
    assert share_of_peak(counts, product) >= product.floor


def test_a_product_is_the_sum_of_its_regions(counter: Counter) -> None:
    """What the table in full stands on: more rows than a region has, blocks of depth and a rest, many columns."""
    product = Product("several of everything", 1050, 40, 4 * 256 + 60, "NT")
    wide = Product("many columns", 60, 1216, 800, "NN")
    direct = counter.products([product, wide])
    for one, counts, composed in zip((product, wide), direct, counter.whole([product, wide]), strict=True):
        assert len(parts(one)) == 4
        assert total(composed).multiply_adds == pytest.approx(total(counts).multiply_adds, rel=1e-9)
        assert total(composed).instructions == pytest.approx(total(counts).instructions, rel=5e-3)


@pytest.mark.parametrize(("cpu", "table"), [("a64fx", "sve"), ("neoverse-n1", "neon")])
def test_every_kernel_of_the_table_is_called(arm: Machine, cpu: str, table: str, tmp_path: Path) -> None:
    """Over a run of each family and storage type, and none of another table."""
    counter = Counter(arm, tmp_path, cpu)
    corpora = make_corpora(tmp_path / "corpora")
    tomls = []
    for family, dtype in sorted(RUNS):
        name = f"{family}-{dtype}"
        changes = {"precision__dtype": dtype, "run__steps": 1}
        config = configuration(corpora, tmp_path / name, family, **changes)
        tomls.append(write_toml(config, tmp_path / f"{name}.toml"))
    (counts,) = counter.run("-c", TRAIN, *tomls)
    called = {short(name) for name in counts if re.search(r"cpu::(sve|neon|scalar)\w*::", name)}
    assert [name for name in called if f"{table}::" not in name] == []
    stored = {(name, dtype) for name in STORED_KERNELS for dtype in STORAGE}
    stored |= {(name, dtype) for family, dtype in RUNS for name in FAMILY_KERNELS[family]}
    expected = {f"{table}::{name}" for name in KERNELS}
    expected |= {f"{table}::{name}<{table}::{STORAGE[dtype]}>" for name, dtype in stored}
    called = {name.removeprefix("void ") for name in called}
    assert expected - called == set()
