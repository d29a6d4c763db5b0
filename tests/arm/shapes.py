"""The matrix products that the Fugaku project tuned for: fp32, sequence 2048, hidden 7168, 56 heads of 128, tensor
parallelism (TP) of 1 to 32. In full (WHOLE), and cut so that CI can count them (CUT).

A product is cut to 256 rows and a depth of 512, since all loops repeat from there on: packing and edges weigh no less
than in the whole. What is done with fp16 chains is under a name of its own.
"""

from __future__ import annotations

from collections import Counter as Multiset
from collections import defaultdict
from dataclasses import dataclass
from math import ceil

HIDDEN, LENGTH, HEADS = 7168, 2048, 56
TENSOR_PARALLEL = (1, 2, 4, 8, 16, 32)
DEPTH, CHAIN_DEPTH = 256, 512
"""Elements of k in a block of the A64FX."""
TILE_ROWS, TILE_COLUMNS = 12, 32
COLUMNS = 10 * TILE_COLUMNS
REGION_ROWS, REGION_COLUMNS = 1032, 3072
"""What native/cpu/matmul.cpp packs at once, in whole tiles."""


@dataclass(frozen=True)
class Product:
    """c (m, n) += op(a) (m, k) op(b) (k, n); `kind` says which operands are transposed, as in bench.matmul."""

    name: str
    m: int
    n: int
    k: int
    kind: str
    fp16: bool = False
    """Stored in fp16 and multiplied in chains."""
    of_layer: bool = False
    """Whether a layer without tensor parallelism has this product in its forward pass."""

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return 2 if self.fp16 else 4

    @property
    def depth(self) -> int:
        """Elements of k in a block."""
        return CHAIN_DEPTH if self.fp16 else DEPTH

    @property
    def result_bytes(self) -> int:
        """c, or its fp32 sums, is read and written for each block of depth."""
        return 8 * self.m * self.n * ceil(self.k / self.depth)

    @property
    def packing_bytes(self) -> int:
        """op(a) is read for each region of columns, op(b) for each of rows; packed, both stay in the L2."""
        down, across = ceil(self.m / REGION_ROWS), ceil(self.n / REGION_COLUMNS)
        return self.item * self.k * (self.m * across + self.n * down)

    @property
    def floor(self) -> float:
        """The share of peak that it shall reach: 80 % where m, n and k are 256 and more; 0 for smaller ones.

        In chains 75 % of the peak of fp16: their flushes take 8 % of the pipes.
        """
        if min(self.m, self.n, self.k) < 256:
            return 0.0
        return 0.75 if self.fp16 else 0.8

    def arguments(self) -> dict[str, object]:
        """Of the program that is counted."""
        return {"m": self.m, "n": self.n, "k": self.k, "kind": self.kind, "fp16": self.fp16}


def _sizes(size: int, most: int, tile: int) -> dict[int, int]:
    """How often each size of region occurs along one axis, as matmul.cpp cuts it."""
    region = tile * ceil(ceil(size / ceil(size / most)) / tile)
    return Multiset(min(region, size - first) for first in range(0, size, region))


def _depths(product: Product) -> dict[int, float]:
    """Depths to count, and how often: two blocks and the rest, and then one block for each further one.

    All blocks do the same, but for the first, which does not add to c, and the last one, where it is shorter.
    """
    blocks, rest = divmod(product.k, product.depth)
    if blocks <= 2:
        return {product.k: 1}
    return {2 * product.depth + rest: blocks - 1, product.depth + rest: 2 - blocks}


def _columns(columns: int) -> dict[int, float]:
    """Columns to count, and how often: whole tiles beyond the first ones do what those do."""
    if columns <= 2 * COLUMNS or columns % TILE_COLUMNS:
        return {columns: 1}
    more = columns / COLUMNS - 1
    return {2 * COLUMNS: more, COLUMNS: 1 - more}


def parts(product: Product) -> dict[Product, float]:
    """Calls, and how often each is to be counted, that together execute what the product does.

    A region is a call of its own but for the call itself. Few columns are cut into smaller tasks than many, which
    adds to what is counted, not to what is done: the whole is rather less.
    """
    found: dict[Product, float] = defaultdict(float)
    for rows, down in _sizes(product.m, REGION_ROWS, TILE_ROWS).items():
        for region, across in _sizes(product.n, REGION_COLUMNS, TILE_COLUMNS).items():
            for columns, times in _columns(region).items():
                for depth, blocks in _depths(product).items():
                    piece = Product("", rows, columns, depth, product.kind, product.fp16)
                    found[piece] += down * across * times * blocks
    return dict(found)


def _whole() -> list[Product]:
    products = []
    for tp in TENSOR_PARALLEL:
        layer = tp == 1
        products += [
            Product(f"qkv, tp {tp}", LENGTH, 3 * HIDDEN // tp, HIDDEN, "NT", of_layer=layer),
            Product(f"projection, tp {tp}", LENGTH, HIDDEN, HIDDEN // tp, "NN", of_layer=layer),
            Product(f"up, tp {tp}", LENGTH, 4 * HIDDEN // tp, HIDDEN, "NT", of_layer=layer),
            Product(f"down, tp {tp}", LENGTH, HIDDEN, 4 * HIDDEN // tp, "NN", of_layer=layer),
        ]
    return [
        *products,
        Product("qkv, tp 8, weights", 3 * HIDDEN // 8, HIDDEN, LENGTH, "TN"),
        Product("qkv, tp 8, input", LENGTH, HIDDEN, 3 * HIDDEN // 8, "NN"),
        Product("qkv, tp 32, weights", 3 * HIDDEN // 32, HIDDEN, LENGTH, "TN"),
        Product("qkv, tp 32, input", LENGTH, HIDDEN, 3 * HIDDEN // 32, "NN"),
        Product("scores of a head", LENGTH, LENGTH, HIDDEN // HEADS, "NT"),
        Product("values of a head", LENGTH, HIDDEN // HEADS, LENGTH, "NN"),
        Product("qkv, tp 8, fp16 chains", LENGTH, 3 * HIDDEN // 8, HIDDEN, "NT", fp16=True),
        Product("down, tp 8, fp16 chains", LENGTH, HIDDEN, 4 * HIDDEN // 8, "NN", fp16=True),
        Product("qkv, tp 32, fp16 chains", LENGTH, 3 * HIDDEN // 32, HIDDEN, "NT", fp16=True),
    ]


WHOLE = _whole()
CUT = [
    Product("square of 256", 256, 256, 256, "NT"),
    Product("square of 512", 512, 512, 512, "NT"),
    Product("qkv, tp 32", 256, 672, 512, "NT"),
    Product("qkv, tp 32, weights", 672, 512, 256, "TN"),
    Product("qkv, tp 32, input", 256, 512, 672, "NN"),
    Product("projection, tp 8", 256, HIDDEN // 8, 896, "NN"),
    Product("up, tp 32", 256, 896, 512, "NT"),
    Product("down, tp 32", 256, 512, 896, "NN"),
    Product("scores of a head", 256, 2048, 128, "NT"),
    Product("values of a head", 256, 128, 2048, "NN"),
    Product("qkv, tp 32, fp16 chains", 256, 672, 1024, "NT", fp16=True),
]
