"""The inner loops of the Arm kernels in LLVM's models of the cores: a floor, since a model does not vary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench import mca
from pytrain.errors import UserError
from tests.arm.machine import Machine


@pytest.fixture(scope="module")
def tools() -> None:
    try:
        mca.tool("llvm-mca"), mca.tool("llvm-objdump")
    except UserError:
        pytest.skip("llvm-mca and llvm-objdump are not installed")
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("aarch64-linux-gnu-g++ is not installed")


@pytest.mark.parametrize(("cpu", "pipes"), [("a64fx", 2), ("neoverse-n1", 2), ("neoverse-v1", 2), ("neoverse-v2", 4)])
def test_the_multiply_adds_bind(tools: None, cpu: str, pipes: int) -> None:
    found = {result.kernel: result for result in mca.results([cpu])}
    assert found["matmul_tile"].fmla_per_cycle >= 0.975 * pipes
    assert found["matmul_tile"].bound.startswith("pipes ")
    assert found["peak_flops"].fmla_per_cycle >= 0.975 * pipes
    for kernel in (
        "attention scores, head size 128",
        "attention scores, head size 144",
        "attention values, 128 keys",
    ):
        assert found[kernel].fmla_per_cycle >= 0.9 * pipes
    if cpu == "a64fx":
        assert found["attention scores, head size 64"].fmla_per_cycle >= 1.8


def test_chains_of_fp16_come_near_the_pipes(tools: None) -> None:
    """With the flush of each chain, which the pipes have to do beside."""
    (chain,) = [result for result in mca.results(["a64fx"]) if result.kernel.startswith("fp16 chain")]
    assert 1.8 <= chain.fmla_per_cycle < 1.99
    assert chain.bound.startswith("pipes ")


@pytest.mark.parametrize(("cpu", "pipes"), [("neoverse-v1", 2), ("neoverse-v2", 4)])
def test_the_matrix_products_of_bf16_bind(tools: None, cpu: str, pipes: int) -> None:
    """As many instructions a cycle as of fp32, each of which does four times as much."""
    found = {result.kernel: result for result in mca.results([cpu])}
    assert found["bf16 matmul_tile"].fmla_per_cycle >= 0.975 * pipes
    assert found["bf16 matmul_tile"].bound.startswith("pipes ")
    assert found["bf16 peak_flops"].fmla_per_cycle >= 0.975 * pipes


def test_too_few_accumulators_are_latency(tools: None) -> None:
    """What the models are for: four chains on the A64FX wait for their nine cycles."""
    text = [f"fmla z{i}.s, p0/m, z30.s, z31.s" for i in range(4)]
    code = [mca.Instruction(4 * i, line, None) for i, line in enumerate(text)]
    cycles, bound = mca.cycles_of(mca.CPUS["a64fx"], code, mca.ITERATIONS)
    assert bound == "latency"
    assert 8.9 <= cycles <= 9.1


def test_the_json_file(tools: None, tmp_path: Path) -> None:
    mca.main(["--cpu", "a64fx", "--json", str(tmp_path / "mca.json")])
    entries = json.loads((tmp_path / "mca.json").read_text())
    assert [sorted(entry) for entry in entries] == [["bound", "cpu", "cycles", "fmla_per_cycle", "kernel"]] * len(
        [kernel for kernel in mca.KERNELS if kernel.table_on(mca.CPUS["a64fx"])]
    )
    assert {entry["cpu"] for entry in entries} == {"a64fx"}
    assert not any(entry["kernel"].startswith("bf16") for entry in entries), "an A64FX has no bf16"


def test_the_module_that_is_installed_has_the_same_loop(tools: None, arm: Machine) -> None:
    (built,) = [r for r in mca.results(["a64fx"], arm.module()) if r.kernel == "matmul_tile"]
    assert built.fmla_per_cycle >= 1.95
