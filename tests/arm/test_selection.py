"""Which kernels an Arm core gets, and how large it sees its vectors and caches."""

from __future__ import annotations

import json

import pytest

from tests.arm.machine import Machine

FACTS = """
import json
from pytrain._native import information, kernels
names = kernels.tables()
print(json.dumps({
    "information": information(), "features": kernels.features(),
    "scalar": {name: kernels.is_scalar(name) for name in names},
    "sizes": {name: kernels.block_sizes(name) for name in names},
}))
"""


def facts_of(arm: Machine, cpu: str) -> dict[str, dict[str, object]]:
    facts: dict[str, dict[str, object]] = json.loads(arm.run(cpu, "-c", FACTS).splitlines()[-1])
    return facts


@pytest.mark.parametrize("bits", [128, 256, 512, 1024, 2048])
def test_sve_of_every_length(arm: Machine, bits: int) -> None:
    facts = facts_of(arm, f"sve{bits}")
    assert facts["information"]["isas_available"] == ["sve", "neon", "scalar"]
    assert facts["information"]["isa"] == "sve"
    assert facts["features"]["vector_bits"] == bits
    assert facts["sizes"]["sve"]["tile_columns"] == 2 * bits // 32
    assert facts["scalar"]["sve"] == facts["scalar"]["neon"] == []


def test_the_a64fx_is_known(arm: Machine) -> None:
    facts = facts_of(arm, "a64fx")
    features = facts["features"]
    assert (features["a64fx"], features["arm_bf16"], features["vector_bits"]) == (True, False, 512)
    assert (features["l1_data"], features["l2"], features["cache_line"]) == (64 << 10, 8 << 20, 256)
    assert facts["information"]["blocking"] == "tile 12x32, block 84x256x160"


def test_without_sve_neon_is_chosen(arm: Machine) -> None:
    facts = facts_of(arm, "neoverse-n1")
    assert facts["information"]["isa"] == "neon"
    assert facts["information"]["isas_available"] == ["neon", "scalar"]
    assert facts["features"]["vector_bits"] == 0


def test_info_says_what_it_would_choose(arm: Machine) -> None:
    text = arm.run("a64fx", "-m", "pytrain", "info")
    facts = dict(line.split(":", 1) for line in text.splitlines())
    for name, found in {
        "vectors": "SVE of 512 bits (A64FX), without bf16 products; cache lines of 256 bytes",
        "native isa": "sve",
        "native blocking": "tile 12x32, block 84x256x160",
        "ranks per node": "4 of 12 threads, one per core memory group of an A64FX",
        "fp16 sums": '"chains" is there',
        "rank map": "parallel.tp up to 4 stays on a node",
    }.items():
        assert found in facts[name]
    assert "core groups" in facts
