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
    "bf16": {name: kernels.block_sizes(name, "bf16") for name in names},
}))
"""


def facts_of(arm: Machine, cpu: str) -> dict[str, dict[str, object]]:
    facts: dict[str, dict[str, object]] = json.loads(arm.run(cpu, "-c", FACTS).splitlines()[-1])
    return facts


def assert_words(facts: dict[str, dict[str, object]], expected: dict[str, tuple[int, int]]) -> None:
    """Elements of a word and words of a step, of each table's products of bf16; blocks of whole steps and tiles."""
    for table, words in expected.items():
        sizes = facts["bf16"][table]
        assert (sizes["word_depth"], sizes["step_words"]) == words, table
        assert sizes["block_depth"] % (words[0] * words[1]) == 0
        assert sizes["block_rows"] % sizes["tile_rows"] == sizes["block_columns"] % sizes["tile_columns"] == 0


@pytest.mark.parametrize("bits", [128, 256, 512, 1024, 2048])
def test_sve_of_every_length(arm: Machine, bits: int) -> None:
    facts = facts_of(arm, f"sve{bits}")
    assert facts["information"]["isas_available"] == ["sve_bf16", "sve", "neon_bf16", "neon", "scalar"]
    assert facts["information"]["isa"] == "sve_bf16"
    assert facts["features"]["vector_bits"] == bits
    for table in ("sve_bf16", "sve"):
        assert facts["sizes"][table]["tile_columns"] == 2 * bits // 32
    assert {name for name, fields in facts["scalar"].items() if fields == []} == set(facts["scalar"]) - {"scalar"}
    assert_words(facts, {"sve_bf16": (2, 2), "sve": (1, 1), "neon_bf16": (2, 2), "neon": (1, 1)})


def test_the_a64fx_is_known(arm: Machine) -> None:
    facts = facts_of(arm, "a64fx")
    features = facts["features"]
    assert (features["a64fx"], features["neon_bf16"], features["sve_bf16"]) == (True, False, False)
    assert features["vector_bits"] == 512
    assert facts["information"]["isas_available"] == ["sve", "neon", "scalar"]
    assert facts["information"]["isa"] == "sve"
    assert (features["l1_data"], features["l2"], features["cache_line"]) == (64 << 10, 8 << 20, 256)
    assert facts["information"]["blocking"] == "tile 12x32, block 84x256x160"


def test_without_sve_neon_is_chosen(arm: Machine) -> None:
    facts = facts_of(arm, "neoverse-n1")
    assert facts["information"]["isa"] == "neon"
    assert facts["information"]["isas_available"] == ["neon", "scalar"]
    assert facts["features"]["vector_bits"] == 0


def test_bf16_without_sve(arm: Machine) -> None:
    facts = facts_of(arm, "neon-bf16")
    assert facts["information"]["isa"] == "neon_bf16"
    assert facts["information"]["isas_available"] == ["neon_bf16", "neon", "scalar"]
    assert (facts["features"]["neon_bf16"], facts["features"]["sve_bf16"]) == (True, False)
    assert_words(facts, {"neon_bf16": (2, 2), "neon": (1, 1)})


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
