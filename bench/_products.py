"""Products of a GPT-2 124M step, their operands, and who computes them: the product's kernels, NumPy or PyTorch.

Operands rotate through more than three times the last-level cache, as they do in a step, where a product finds its
weight in memory. A product packs what it reads in every call, so that a weight's packing is charged in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ._probe import last_cache_bytes

if TYPE_CHECKING:
    from pytrain._native import CpuDevice

Work = Callable[[], object]
HIDDEN, VOCABULARY = 768, 50257
CACHE_LINE = 64


class Layer(NamedTuple):
    """y (rows, outputs) = x (rows, inputs) W, and how often a step has it."""

    name: str
    outputs: int
    inputs: int
    repeats: int
    row_parallel: bool = False
    epilogue: tuple[str, ...] = ()
    """What its forward product adds as it is written: "bias", "residual", "activated" (GELU of y beside y)."""


def layers(vocabulary: int = VOCABULARY) -> list[Layer]:
    """The matrices of a step."""
    return [
        Layer("qkv", 3 * HIDDEN, HIDDEN, 12, epilogue=("bias",)),
        Layer("attention.out", HIDDEN, HIDDEN, 12, row_parallel=True, epilogue=("bias", "residual")),
        Layer("mlp.up", 4 * HIDDEN, HIDDEN, 12, epilogue=("bias", "activated")),
        Layer("mlp.down", HIDDEN, 4 * HIDDEN, 12, row_parallel=True, epilogue=("bias", "residual")),
        Layer("head", vocabulary, HIDDEN, 1),
    ]


class Product(NamedTuple):
    """c (m, n) = op(a) op(b)."""

    layer: str
    what: str
    """forward, dX or dW"""
    kind: str
    """NN, NT or TN: T where an operand is stored transposed."""
    m: int
    n: int
    k: int
    fp32_result: bool
    accumulate: bool = False
    epilogue: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As tables have it."""
        return f"{self.layer} {self.what}"

    @property
    def flops(self) -> float:
        """Of the multiply-adds; an epilogue counts as none."""
        return 2.0 * self.m * self.n * self.k

    def bare(self) -> Product:
        """The product alone, as any library has it."""
        return self._replace(accumulate=False, epilogue=())


def products(layer: Layer, rows: int) -> list[Product]:
    """The forward product, the input gradient and the weight gradient of a layer, in a step of one micro-batch.

    A weight's gradient is written, not added to, but for the head's: chunks of logits after the first add to it.
    """
    forward, backward = ("NN", "NT") if layer.row_parallel else ("NT", "NN")
    weight = (layer.inputs, layer.outputs) if layer.row_parallel else (layer.outputs, layer.inputs)
    head = layer.name == "head"
    return [
        Product(layer.name, "forward", forward, rows, layer.outputs, layer.inputs, head, epilogue=layer.epilogue),
        Product(layer.name, "dX", backward, rows, layer.inputs, layer.outputs, False),
        Product(layer.name, "dW", "TN", *weight, rows, True, accumulate=head),
    ]


def aligned(values: NDArray[Any]) -> NDArray[Any]:
    """The same numbers in an array that begins a cache line, as the product's buffers do.

    NumPy's own begin 16 bytes into one: then every vector of 64 bytes lies in two lines.
    """
    room = np.empty(values.nbytes + CACHE_LINE, np.uint8)
    skip = -room.ctypes.data % CACHE_LINE
    found = room[skip : skip + values.nbytes].view(values.dtype).reshape(values.shape)
    found[...] = values
    return found


def random_array(dtype: str, *shape: int) -> NDArray[Any]:
    """Random numbers as they are stored: float32, or uint16 with bits of bf16 or fp16; they begin a cache line."""
    values = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    if dtype == "fp32":
        return aligned(values)
    return aligned(values.astype(ml_dtypes.bfloat16 if dtype == "bf16" else np.float16).view(np.uint16))


class Operands(NamedTuple):
    """One set; a and b as they are stored."""

    c: NDArray[Any]
    a: NDArray[Any]
    b: NDArray[Any]
    extra: dict[str, NDArray[Any]]
    """Arrays of the epilogue, by the name of the argument."""


def operands(product: Product, dtype: str) -> list[Operands]:
    """So many sets that one comes round again after more than three times the last-level cache."""
    m, n, k = product.m, product.n, product.k
    first = Operands(
        random_array("fp32" if product.fp32_result else dtype, m, n),
        random_array(dtype, *((k, m) if product.kind[0] == "T" else (m, k))),
        random_array(dtype, *((n, k) if product.kind[1] == "T" else (k, n))),
        {name: random_array(dtype, *((n,) if name == "bias" else (m, n))) for name in product.epilogue},
    )
    arrays = (*first[:3], *first.extra.values())
    count = 3 * last_cache_bytes() // sum(array.nbytes for array in arrays) + 1
    more = [
        Operands(
            aligned(first.c),
            aligned(first.a),
            aligned(first.b),
            {name: aligned(x) for name, x in first.extra.items()},
        )
        for _ in range(count - 1)
    ]
    return [first, *more]


class Rotation:
    """The sets in turn. All who compute share one, so that nobody finds in a cache what another just read."""

    def __init__(self, product: Product, dtype: str) -> None:
        self.product, self.dtype = product, dtype
        self.sets = operands(product, dtype)
        self._turn = cycle(range(len(self.sets)))

    def next(self) -> int:
        """Which set is next."""
        return next(self._turn)

    def views(self) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """(op(a), op(b), c) of each set, as libraries that read strides take them."""
        turned_a, turned_b = (letter == "T" for letter in self.product.kind)
        for c, a, b, _ in self.sets:
            yield a.T if turned_a else a, b.T if turned_b else b, c

    def own_call(self, device: CpuDevice) -> Work:
        """A function that computes the product with the next set."""
        turned_a, turned_b = (letter == "T" for letter in self.product.kind)
        options: dict[str, Any] = {
            "transpose_a": turned_a,
            "transpose_b": turned_b,
            "accumulate": self.product.accumulate,
            "half": "bf16" if self.dtype == "fp32" else self.dtype,
        }

        def work() -> None:
            c, a, b, extra = self.sets[self.next()]
            device.matmul(c, a, b, **options, **cast(Any, extra))

        return work

    def numpy_call(self) -> Work:
        """The same by NumPy's BLAS, fp32 alone."""
        views = list(self.views())

        def work() -> None:
            left, right, out = views[self.next()]
            np.matmul(left, right, out=out)

        return work

    def torch_call(self, torch: Any) -> Work:
        """The same by PyTorch. Its products of bf16 give bf16, where a step wants some of ours in fp32."""
        m, n = self.product.m, self.product.n

        def tensor(array: NDArray[Any]) -> Any:
            found = torch.from_numpy(array)
            return found.view(torch.bfloat16) if array.dtype == np.uint16 else found

        def result(array: NDArray[Any]) -> Any:
            found = tensor(array)
            if self.dtype == "bf16" and found.dtype == torch.float32:
                return found.view(torch.bfloat16).reshape(-1)[: m * n].view(m, n)  # half of the same memory
            return found

        views = [(tensor(left), tensor(right), result(out)) for left, right, out in self.views()]

        def work() -> None:
            left, right, out = views[self.next()]
            torch.mm(left, right, out=out)

        return work
