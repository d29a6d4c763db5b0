"""Rows of bf16 and fp16 are widened and rounded in registers: the bits must be those of doing it in memory.

What the fp32 kernels compute is tested against float64 in test_kernels.py and test_device.py, rounding by itself in
test_kernels.py: here it is that a kernel of another storage type is the three of them one after the other.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pytrain._native import CpuDevice, kernels

from .arrays import Array

EPS = 1e-5
SPECIAL = [np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-40, -3e-41, 65504.0, -1e-7]
Operation = Callable[[str, tuple[Array, ...]], tuple[Array, ...]]


class Rows:
    """Random rows of one storage type and the same numbers in fp32."""

    def __init__(self, isa: str, half: str, seed: int) -> None:
        print("seed", seed)
        self.isa, self.half = isa, half
        self.device = CpuDevice(isa, 2)
        self.device.reserve(64, 5000, 64)
        self.generator = np.random.default_rng(seed)

    def normal(self, *shape: int, special: bool = False) -> Array:
        values = self.generator.normal(0.0, 2.0, shape).astype(np.float32)
        if special:  # anywhere, so that vectors and tails meet them
            places = self.generator.integers(0, values.size, min(len(SPECIAL), values.size))
            values.reshape(-1)[places] = SPECIAL[: len(places)]
        return kernels.narrow(self.isa, values.reshape(-1), self.half).reshape(shape)

    def widened(self, x: Array) -> Array:
        return kernels.widen(self.isa, x.reshape(-1), self.half).reshape(x.shape)

    def narrowed(self, x: Array) -> Array:
        return kernels.narrow(self.isa, x.reshape(-1), self.half).reshape(x.shape)

    def check(self, operation: str, stored: dict[str, Array], *, outputs: tuple[str, ...], **others: object) -> None:
        """Call it with 16-bit arrays, with fp32 ones, whose results are then rounded, and with mixed types."""
        wide = {name: self.widened(x) for name, x in stored.items()}
        sums = {name: x for name, x in others.items() if isinstance(x, np.ndarray) and name.startswith("d")}
        results = []
        for mixed in ((), tuple(stored), outputs, tuple(name for name in stored if name not in outputs)):
            arrays = {name: (wide if name in mixed else stored)[name].copy() for name in stored}
            added = {name: x.copy() for name, x in sums.items()}
            getattr(self.device, operation)(**arrays, **{**others, **added}, half=self.half)
            results.append(
                [arrays[n] if arrays[n].dtype == np.uint16 else self.narrowed(arrays[n]) for n in outputs]
                + list(added.values())
            )
        for result in results:
            for name, one, first in zip((*outputs, *sums), result, results[1], strict=True):
                np.testing.assert_array_equal(one, first, err_msg=f"{operation}: {name}")
                assert one.tobytes() == first.tobytes()


@pytest.fixture(params=kernels.tables())
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["bf16", "fp16"])
def rows(isa: str, request: pytest.FixtureRequest) -> Rows:
    return Rows(isa, request.param, seed=len(request.node.name))


@pytest.mark.parametrize("n", [1, 15, 33, 100, 4131])
def test_gelu(rows: Rows, n: int) -> None:
    x, dy, y = rows.normal(n, special=True), rows.normal(n, special=True), rows.normal(n)
    rows.check("gelu_forward", {"y": y, "x": x}, outputs=("y",))
    rows.check("gelu_backward", {"dx": y, "dy": dy, "x": x, "y": y}, outputs=("dx", "y"))


@pytest.mark.parametrize(("count", "width"), [(1, 1), (3, 33), (2, 131), (2, 4131)])
def test_swiglu(rows: Rows, count: int, width: int) -> None:
    gate_up = rows.normal(count, 2 * width, special=True)
    dy, y = rows.normal(count, width, special=True), rows.normal(count, width)
    rows.check("swiglu_forward", {"y": y, "gate_up": gate_up}, outputs=("y",))
    stored = {"dgate_up": gate_up, "dy": dy, "gate_up": gate_up, "y": y}
    rows.check("swiglu_backward", stored, outputs=("dgate_up", "y"))


@pytest.mark.parametrize("head_size", [2, 30, 64, 80])
def test_rope(rows: Rows, head_size: int) -> None:
    count, heads = 5, 3
    angles = rows.generator.normal(size=(7, head_size // 2))
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    positions = rows.generator.integers(0, 7, count).astype(np.int32)
    x = rows.normal(count, heads * head_size, special=True)
    for inverse in (False, True):
        stored, wide = x.copy(), rows.widened(x)
        for array in (stored, wide):
            rows.device.rope(array, heads, head_size, positions, table, inverse, rows.half)
        assert stored.tobytes() == rows.narrowed(wide).tobytes()
        assert stored.tobytes() != x.tobytes()


@pytest.mark.parametrize("width", [1, 17, 131, 700])
def test_residual_add(rows: Rows, width: int) -> None:
    x, partial, bias = rows.normal(5, width, special=True), rows.normal(5, width, special=True), rows.normal(width)
    for added in (None, bias):
        rows.check("residual_add", {"x": x, "partial": partial}, outputs=("x",), bias=added)


@pytest.mark.parametrize(("count", "width"), [(1, 1), (3, 17), (5, 131), (70, 700), (33, 64)])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norm(rows: Rows, kind: str, count: int, width: int) -> None:
    centered = kind == "layernorm"
    x, y, dx, dy = (rows.normal(count, width) for _ in range(4))
    weight, bias = rows.normal(width), rows.normal(width) if centered else None
    mean, rstd = np.zeros(count, np.float32) if centered else None, np.zeros(count, np.float32)
    others = {"mean": mean, "rstd": rstd, "weight": weight}
    rows.check("norm_forward", {"y": y, "x": x}, outputs=("y",), **others, bias=bias, eps=EPS)
    dweight, dbias = rows.generator.normal(size=(2, width)).astype(np.float32)
    sums = {"dweight": dweight, "dbias": dbias if centered else None}
    rows.check("norm_backward", {"dx": dx, "dy": dy, "x": x}, outputs=("dx",), **others, **sums)


@pytest.mark.parametrize("n", [1, 33, 4131])
def test_adamw_rounds_weights(rows: Rows, n: int) -> None:
    master, m, v, gradient = (rows.generator.normal(size=n).astype(np.float32) for _ in range(4))
    weights = rows.normal(n)
    options = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "step_size": 0.1, "correction2": 1.5, "decay": 0.1}
    alone = master.copy()
    rows.device.adamw(alone, alone, m.copy(), np.abs(v), gradient, np.ones(6), **options, half=rows.half)
    before = master.copy()
    rows.device.adamw(weights, master, m, np.abs(v), gradient, np.ones(6), **options, half=rows.half)
    assert master.tobytes() == alone.tobytes() != before.tobytes()
    assert weights.tobytes() == rows.narrowed(master).tobytes()
