"""What an Arm core executes in pytrain's kernels, instruction by instruction, counted under emulation.

    python -m tests.arm.counts FOLDER            with the machine that setup.sh made in FOLDER: a minute
    python -m tests.arm.counts FOLDER --whole    products of the Fugaku project in full: minutes

Prints, for products of the shapes of the Fugaku project (see tests.arm.shapes), the instructions of the whole call
(packing, edges, all tiles) per multiply-add, and the share of an A64FX core's peak that they predict; then both for a
training step, and attention's share of a layer.

The prediction adds up, function by function, the worst of three bounds: multiply-adds, and what else a tile does on
their pipes, at two a cycle; instructions at four a cycle in the tile, where a model confirms it (bench.mca), and at
two elsewhere, a guess on the careful side; bytes from memory, at 256 GB/s for twelve cores of 2.2 GHz. Left out:
threads that wait for one another.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.mca import Instruction, disassemble
from tests.arm.machine import ROOT, Machine
from tests.arm.shapes import CUT, WHOLE, Product, parts
from tests.runs import configuration, make_corpora, write_toml

FMLA_RATE, TILE_RATE, OTHER_RATE = 2.0, 4.0, 2.0
BYTES_PER_CYCLE = 256e9 / 12 / 2.2e9
VECTOR_BYTES = 64
TOGETHER = 8
"""Calls that one process makes, within the time limit of a process."""
FLUSH = re.compile(r"(fcvt|fadd|lsr)\b.*z\d")
"""What a chain of fp16 does on the pipes of the multiply-adds beside them."""

PROGRAM = """
import json, os, sys
import numpy as np
from pytrain._native import CpuDevice

def matmul(device, m, n, k, kind, fp16=False):
    dtype = np.uint16 if fp16 else np.float32
    a = np.ones((k, m) if kind[0] == "T" else (m, k), dtype)
    b = np.ones((n, k) if kind[1] == "T" else (k, n), dtype)
    c = np.zeros((m, n), dtype)
    settings = {"transpose_a": kind[0] == "T", "transpose_b": kind[1] == "T", "accumulate": kind == "TN"}
    return lambda: device.matmul(c, a, b, half="fp16", **settings)

def attention(device, length, head_size, backward):
    device.reserve(1, 1, head_size)
    q, k, v, dout = np.full((4, 1, length, head_size), 0.1, np.float32)
    out, lse = np.zeros_like(q), np.zeros((1, 1, length), np.float32)
    forward = lambda: device.attention_forward(out, lse, q, k, v, heads=1, kv_heads=1)
    if not backward:
        return forward
    forward()
    into = [np.zeros_like(q) for _ in range(3)] + [np.zeros_like(lse)]
    return lambda: device.attention_backward(*into, dout, out, lse, q, k, v, heads=1, kv_heads=1)

SMALL = {"m": 40, "n": 40, "k": 40, "length": 40}
for what, arguments in json.loads(sys.argv[1]):
    make, device = globals()[what], CpuDevice(threads=1, fp16_chains=arguments.get("fp16", False))
    # A small one first: what a device allocates once is not counted.
    make(device, **{key: min(value, SMALL[key]) if key in SMALL else value for key, value in arguments.items()})()
    call = make(device, **arguments)
    os.getsid(0)
    call()
    os.getsid(0)
"""


@dataclass
class Count:
    """Executed instructions of one function: all, multiply-adds, and what else keeps their pipes in its tile."""

    instructions: float = 0
    multiply_adds: float = 0
    flushes: float = 0

    def __add__(self, other: Count) -> Count:
        return self.plus(other, 1)

    def plus(self, other: Count, times: float) -> Count:
        """This and `times` the other."""
        return Count(
            self.instructions + times * other.instructions,
            self.multiply_adds + times * other.multiply_adds,
            self.flushes + times * other.flushes,
        )


Counts = dict[str, Count]
"""By function; those without one are not called."""


@dataclass
class Counter:
    """Counts what programs execute inside `pytrain._native` on an emulated CPU."""

    arm: Machine
    folder: Path
    cpu: str = "a64fx"
    functions: dict[int, tuple[str, Instruction]] = field(init=False)

    def __post_init__(self) -> None:
        source = Path(__file__).with_name("executed.c")
        plugin = self.folder / "executed.so"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(plugin), str(source)], check=True)
        self.functions = {
            instruction.address: (name, instruction)
            for name, body in disassemble(self.arm.module()).items()
            for instruction in body
        }

    def run(self, *arguments: str | Path) -> list[Counts]:
        """Counts of `python ARGUMENTS`: from the start, and from each of its calls of getsid, to the next."""
        output = self.folder / "executed.txt"
        settings = {"QEMU_PLUGIN": f"{self.folder / 'executed.so'},out={output}"}
        self.arm.run(self.cpu, *arguments, settings=settings)
        text, _, maps = output.read_text().rpartition("\n\n")
        base, end = self._extent(maps)
        return [self._part(part.splitlines(), base, end) for part in f"{text}\n".split("--\n")]

    def _part(self, lines: Iterable[str], base: int, end: int) -> Counts:
        counts: dict[str, Count] = defaultdict(Count)
        for line in lines:
            address, length, times = int(line.split()[0], 16), *map(int, line.split()[1:])
            if base <= address < end:
                for offset in range(address - base, address - base + 4 * length, 4):
                    name, instruction = self.functions[offset]
                    tile = "matmul_tile" in name
                    # The products that a tile begins its sums with are its first step of k.
                    useful = instruction.multiplies if tile else instruction.is_multiply_add
                    flush = tile and FLUSH.match(instruction.text) is not None
                    counts[name] = counts[name].plus(Count(1, useful, flush), times)
        return dict(counts)

    def _extent(self, maps: str) -> tuple[int, int]:
        """Where the module lay in the process."""
        name = self.arm.module().name
        found = [
            [int(bound, 16) for bound in line.split()[0].split("-")] for line in maps.splitlines() if name in line
        ]
        assert found, f"{name} is not in the memory map"
        return min(begin for begin, _ in found), max(end for _, end in found)

    def calls(self, calls: Sequence[tuple[str, dict[str, object]]]) -> list[Counts]:
        """Counts of a call of each: (matmul or attention, its arguments in PROGRAM)."""
        found = self.run("-c", PROGRAM, json.dumps(calls))
        assert len(found) == 2 * len(calls) + 1
        return found[1::2]

    def products(self, products: Sequence[Product]) -> list[Counts]:
        """Counts of a call of matmul for each."""
        return self.calls([("matmul", product.arguments()) for product in products])

    def whole(self, products: Sequence[Product]) -> list[Counts]:
        """Counts of calls of any size, put together from smaller ones, which many of them share."""
        pieces = list({piece: None for product in products for piece in parts(product)})
        counted: dict[Product, Counts] = {}
        for first in range(0, len(pieces), TOGETHER):
            some = pieces[first : first + TOGETHER]
            counted.update(zip(some, self.products(some), strict=True))
        return [combine((counted[piece], times) for piece, times in parts(product).items()) for product in products]

    def attention(self, length: int, head_size: int) -> Counts:
        """Counts of one causal head of attention, forward and backward."""
        sizes = {"length": length, "head_size": head_size}
        found = self.calls([("attention", {**sizes, "backward": backward}) for backward in (False, True)])
        return combine((counts, 1) for counts in found)


def combine(parts: Iterable[tuple[Counts, float]]) -> Counts:
    """The sum of counts, each so often."""
    found: Counts = defaultdict(Count)
    for counts, times in parts:
        for name, count in counts.items():
            found[name] = found[name].plus(count, times)
    return {name: count for name, count in found.items() if count.instructions > 0}


def total(counts: Counts) -> Count:
    """All functions together."""
    return sum(counts.values(), Count())


def others(count: Count) -> float:
    """Instructions that are no multiply-add, per multiply-add."""
    return (count.instructions - count.multiply_adds) / count.multiply_adds


def tile_bounds(counts: Counts) -> dict[str, float]:
    """Cycles of one A64FX core that pipes and decoders give the tiles."""
    tile = sum((count for name, count in counts.items() if "matmul_tile" in name), Count())
    return {
        "multiply-adds": (tile.multiply_adds + tile.flushes) / FMLA_RATE,
        "issue": tile.instructions / TILE_RATE,
    }


def bounds(counts: Counts, product: Product) -> dict[str, dict[str, float]]:
    """Cycles of one A64FX core that each bound gives each part of a product whose execution was counted."""
    packing = sum(count.instructions for name, count in counts.items() if "::pack_" in name)
    tile = sum(count.instructions for name, count in counts.items() if "matmul_tile" in name)
    return {
        "tile": {**tile_bounds(counts), "memory": product.result_bytes / BYTES_PER_CYCLE},
        "packing": {"issue": packing / OTHER_RATE, "memory": product.packing_bytes / BYTES_PER_CYCLE},
        "rest": {"issue": (total(counts).instructions - tile - packing) / OTHER_RATE},
    }


def predicted_cycles(counts: Counts, product: Product) -> float:
    """The worst bound of each part, added up; see the module's docstring."""
    return sum(max(part.values()) for part in bounds(counts, product).values())


def attention_cycles(counts: Counts) -> float:
    """The same for attention, whose blocks stay in the cache: no bytes."""
    tile = sum(count.instructions for name, count in counts.items() if "matmul_tile" in name)
    return max(tile_bounds(counts).values()) + (total(counts).instructions - tile) / OTHER_RATE


def binding(counts: Counts, product: Product) -> str:
    """What binds the tile and what the packing."""
    found = bounds(counts, product)
    return ", ".join(max(found[name], key=found[name].__getitem__) for name in ("tile", "packing"))


def share_of_peak(counts: Counts, product: Product) -> float:
    """Useful multiply-adds over what the predicted cycles could hold, at the rate of the product's number format."""
    lanes = VECTOR_BYTES // product.item
    return product.m * product.n * product.k / lanes / FMLA_RATE / predicted_cycles(counts, product)


def step(counter: Counter, folder: Path) -> Counts:
    """Counts of one training step of the tests' GPT-2 (2 layers, hidden 24): two steps less one."""
    corpora = make_corpora(folder / "corpora")

    def counted(steps: int) -> Counts:
        config = configuration(corpora, folder / f"run{steps}", "gpt2", run__steps=steps)
        (counts,) = counter.run("-m", "pytrain", "train", write_toml(config, folder / f"run{steps}.toml"))
        return counts

    once, twice = counted(1), counted(2)
    return combine(((twice, 1), (once, -1)))


def short(name: str) -> str:
    """A function's name without namespaces and arguments."""
    return re.sub(
        r"\(anonymous namespace\)::|pytrain::(cpu::)?|\(.*", "", name.replace("(anonymous namespace)::", "")
    )


Counted = tuple[Product, Counts]


def print_products(rows: Iterable[Counted]) -> None:
    """The table of shapes."""
    print(
        f"{'product':<28} {'m':>5} {'n':>5} {'k':>5}    {'others per FMLA':>15} {'share of peak':>14}  "
        "what binds tile, packing"
    )
    for product, counts in rows:
        share = 100 * share_of_peak(counts, product)
        print(
            f"{product.name:<28} {product.m:>5} {product.n:>5} {product.k:>5} {product.kind} "
            f"{others(total(counts)):>15.3f} {share:>13.1f}%  {binding(counts, product)}",
            flush=True,
        )


def print_layer(counter: Counter, counted: Iterable[Counted]) -> None:
    """Attention's part of the predicted cycles of a layer of the Fugaku project (hidden 7168, 56 heads, s 2048)."""
    hidden, heads, length = 7168, 56, 2048
    attention = heads * attention_cycles(counter.attention(length, hidden // heads))
    products = sum(predicted_cycles(counts, product) for product, counts in counted if product.of_layer)
    # Forward, dX and dW are the same multiply-adds three times.
    share = attention / (attention + 3 * products)
    useful = heads * 7 * length * length * (hidden // heads) / 2 / 16 / FMLA_RATE
    print(
        f"attention of {heads} heads of {hidden // heads}, {length} tokens, forward and backward: "
        f"{100 * useful / attention:.1f}% of peak, "
        f"{100 * share:.1f}% of the cycles of a layer's products and attention"
    )


def print_step(counter: Counter, folder: Path) -> None:
    """The functions of a step that execute most."""
    counts = step(counter, folder)
    whole = total(counts)
    print(f"a step of a tiny GPT-2: {whole.instructions:.0f} instructions, {others(whole):.2f} others per FMLA")
    for name, count in sorted(counts.items(), key=lambda entry: -entry[1].instructions)[:8]:
        print(f"    {100 * count.instructions / whole.instructions:>4.1f}%  {short(name)}")


def main(folder: Path, whole: bool) -> None:
    """Print the table of shapes, in full or cut, and either a layer or a tiny step."""
    assert shutil.which("cc"), "a C compiler is needed for the plugin"
    with tempfile.TemporaryDirectory() as scratch:
        counter = Counter(Machine(folder.resolve()), Path(scratch))
        if whole:
            counted = list(zip(WHOLE, counter.whole(WHOLE), strict=True))
            print_products(counted)
            print_layer(counter, counted)
        else:
            print_products(zip(CUT, counter.products(CUT), strict=True))
            print_step(counter, Path(scratch))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], ["--whole"]) or not (ROOT / "tests").exists():
        sys.exit("usage, in a checkout: python -m tests.arm.counts FOLDER [--whole]")
    main(Path(sys.argv[1]), len(sys.argv) == 3)
