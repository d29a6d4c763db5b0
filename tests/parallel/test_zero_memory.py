"""What each ZeRO stage leaves a rank with, as the native allocator counted it while two steps were trained.

The bounds come from the shapes of the tensors alone, not from the code that cuts them.
"""

import json
from typing import Any

import numpy as np
import pytest

from pytrain.errors import UserError
from tests import reference
from tests.parallel.grid_worker import SHAPES, run_config
from tests.parallel.launch import check_ranks

ALIGNMENT = 32
"""Elements: each group of adjacent tensors may begin this much after the one before it."""


def padded(sizes: dict[str, int]) -> int:
    """At most so many elements when the tensors lie in one flat range."""
    return sum(size + ALIGNMENT for size in sizes.values())


def buckets(shape: reference.Shape) -> dict[str, dict[str, int]]:
    """Elements of each tensor, by the layer it belongs to; the embedding and the head are one each."""
    found: dict[str, dict[str, int]] = {}
    for name, size in reference.parameter_shapes(shape).items():
        parts = name.split(".")
        bucket = f"layer {parts[1]}" if parts[0] == "layer" else "embed" if parts[0] == "embed" else "head"
        found.setdefault(bucket, {})[name] = int(np.prod(size))
    return found


@pytest.fixture(scope="module", params=[2, 4])
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(ranks, results by shape and ZeRO stage) of dp = ranks."""
    folder = tmp_path_factory.mktemp("memory")
    cases = [
        {"shape": shape, "dp": request.param, "zero": zero, "recompute": "none"}
        for shape in ("llama", "gpt2")
        for zero in range(4)
    ]
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    check_ranks(request.param, "tests.parallel.memory_worker", str(folder / "cases.json"), str(folder / "out.json"))
    results = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    return request.param, {(case["shape"], case["zero"]): result for case, result in zip(cases, results, strict=True)}


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_what_is_sharded_is_a_shard(measured: Any, shape: str) -> None:
    ranks, results = measured
    tensors = buckets(SHAPES[shape])
    total = sum(padded(of_bucket) for of_bucket in tensors.values())
    exact = sum(sum(of_bucket.values()) for of_bucket in tensors.values())
    shard = 4 * (total / ranks + len(tensors))  # bytes; each bucket's last shard may be rounded up
    largest = sorted((4 * padded(of_bucket) for of_bucket in tensors.values()), reverse=True)
    layer = max(4 * padded(of_bucket) for name, of_bucket in tensors.items() if name.startswith("layer"))
    assert largest[0] == layer, "choose a shape whose layers are its largest buckets"
    tied = 4 * padded(tensors["embed"]) if SHAPES[shape].tied_head else 0
    for zero in range(4):
        for rank in results[shape, zero]:
            assert rank["weights"] <= (shard + 2 * layer if zero == 3 else 4 * (total + ranks * len(tensors)))
            assert rank["gradients"] <= (
                shard + 2 * layer + tied if zero >= 2 else 4 * (total + ranks * len(tensors))
            )
            assert rank["optimizer"] <= (2 * shard if zero >= 1 else 8 * total)
            # None of it is smaller than what has to be there.
            assert rank["weights"] >= 4 * exact / (ranks if zero == 3 else 1)
            assert rank["gradients"] >= 4 * exact / (ranks if zero >= 2 else 1)
            assert rank["optimizer"] >= 8 * exact / (ranks if zero >= 1 else 1)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"shape": "llama", "schedule": "zero-bubble"}, 'zero 2 does not go with schedule "zero-bubble"'),
        ({"shape": "gpt2", "schedule": "1f1b"}, "zero 2 does not go with model.tied_head"),
    ],
)
def test_zero_with_a_pipeline(keys: dict[str, Any], words: str) -> None:
    """What ZeRO-2 and 3 cannot do with pp > 1 is refused, and the rest is in the grid tests."""
    with pytest.raises(UserError, match=words):
        run_config({"dp": 2, "pp": 2, "zero": 2, **keys}, grid=True)
