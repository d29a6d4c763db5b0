"""Headers against the safetensors library."""

import numpy as np
import pytest
import safetensors.numpy

from pytrain.checkpoint.header import layout_file, layout_files
from pytrain.checkpoint.pieces import TensorEntry
from tests.checkpoint_cases import ENTRIES, random_arrays

GOLDEN = bytes.fromhex(
    "58000000000000007b225f5f6d657461646174615f5f223a7b22666f726d6174223a227074227d2c2261223a7b226474797065223a2246"
    "3332222c227368617065223a5b325d2c22646174615f6f666673657473223a5b302c385d7d7d2020200000803f00000040"
)


def test_golden_bytes() -> None:
    layout = layout_file([TensorEntry("x", "a", "fp32", (2,))])
    assert layout.header + np.array([1, 2], np.float32).tobytes() == GOLDEN
    assert layout.size == len(GOLDEN)
    assert layout.begins == {"a": len(GOLDEN) - 8}


@pytest.mark.parametrize("seed", range(8))
def test_header_is_what_the_library_writes(seed: int) -> None:
    random = np.random.default_rng(seed)
    entries = [
        TensorEntry("x", name, str(random.choice(["fp32", "fp16"])), tuple(random.integers(1, 6, rank).tolist()))
        for name, rank in zip(
            ["z", "layer.10.a", "layer.2.a", "重み", 'quote"', "b\\"], [1, 2, 3, 1, 2, 2], strict=True
        )
    ]
    arrays = random_arrays(entries, seed)
    shaped = {
        entry.tensor: arrays[entry.tensor]
        .view(np.float32 if entry.dtype == "fp32" else np.float16)
        .reshape(entry.shape)
        for entry in entries
    }
    theirs = safetensors.numpy.save(shaped, metadata={"format": "pt"})
    random.shuffle(entries)
    layout = layout_file(entries)
    assert layout.header == theirs[: len(layout.header)]
    assert layout.size == len(theirs)
    for entry in entries:
        begin = layout.begins[entry.tensor]
        assert theirs[begin : begin + entry.bytes] == shaped[entry.tensor].tobytes()


def test_files_are_those_of_the_table() -> None:
    files = layout_files(ENTRIES)
    assert list(files) == [
        "embed.weights.safetensors",
        "layer_000.optimizer.safetensors",
        "layer_000.weights.safetensors",
    ]
    assert list(files["layer_000.optimizer.safetensors"].entries) == ["layer.0.norm1.weight.m"]
