"""What an Arm core executes in pytrain's kernels, instruction by instruction, counted under emulation.

    python -m tests.arm.counts FOLDER        with the machine that setup.sh made in FOLDER

Prints, for products of the shapes of the Fugaku project, the instructions of the whole call (packing, edges, all
tiles) per multiply-add, and the share of an A64FX core's peak that they predict; then both for a training step.

The shapes are those that their team tuned for, fp32, hidden 7168, tensor parallelism over 32 and 8; 2048 rows and a
depth of 7168 are cut to 256 and 512, since all loops repeat from there on: packing and edges weigh no more in the
whole.

The prediction adds up, function by function, the worst of three bounds: multiply-adds at two a cycle; instructions
at four a cycle in the tile, where a model confirms it (bench.mca), and at two elsewhere, a guess on the careful side;
bytes from memory, at 256 GB/s for twelve cores of 2.2 GHz. Left out: threads that wait for one another.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.mca import Instruction, disassemble
from tests.arm.machine import ROOT, Machine
from tests.runs import configuration, make_corpora, write_toml

SHAPES = {
    "square of 256": (256, 256, 256, "NT"),
    "square of 512": (512, 512, 512, "NT"),
    "qkv, tp 32": (256, 672, 512, "NT"),
    "qkv, tp 32, weights": (672, 512, 256, "TN"),
    "qkv, tp 32, input": (256, 512, 672, "NN"),
    "projection, tp 8": (256, 7168 // 8, 896, "NN"),
    "up, tp 32": (256, 896, 512, "NT"),
    "down, tp 32": (256, 512, 896, "NN"),
    "scores of a head": (256, 2048, 128, "NT"),
    "values of a head": (256, 128, 2048, "NN"),
}
"""m, n, k and which operands are transposed, as in bench.matmul."""
LANES, FMLA_RATE, TILE_RATE, OTHER_RATE = 16, 2.0, 4.0, 2.0
BYTES_PER_CYCLE = 256e9 / 12 / 2.2e9

PRODUCT = """
import sys
import numpy as np
from pytrain._native import CpuDevice
m, n, k, kind, calls = *map(int, sys.argv[1:4]), sys.argv[4], int(sys.argv[5])
a = np.ones((k, m) if kind[0] == "T" else (m, k), np.float32)
b = np.ones((n, k) if kind[1] == "T" else (k, n), np.float32)
c, device = np.zeros((m, n), np.float32), CpuDevice(threads=1)
for _ in range(calls):
    device.matmul(c, a, b, transpose_a=kind[0] == "T", transpose_b=kind[1] == "T", accumulate=kind == "TN")
"""


@dataclass
class Count:
    """Executed instructions of one function."""

    instructions: int = 0
    multiply_adds: int = 0


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

    def run(self, *arguments: str | Path) -> dict[str, Count]:
        """Counts by function of `python ARGUMENTS`; functions without one are not called."""
        output = self.folder / "executed.txt"
        settings = {"QEMU_PLUGIN": f"{self.folder / 'executed.so'},out={output}"}
        self.arm.run(self.cpu, *arguments, settings=settings)
        text, _, maps = output.read_text().partition("\n\n")
        base, end = self._extent(maps)
        counts: dict[str, Count] = defaultdict(Count)
        for line in text.splitlines():
            address, length, times = int(line.split()[0], 16), *map(int, line.split()[1:])
            if base <= address < end:
                for offset in range(address - base, address - base + 4 * length, 4):
                    name, instruction = self.functions[offset]
                    counts[name].instructions += times
                    # The products that a tile begins its sums with are its first step of k.
                    useful = instruction.multiplies if "matmul_tile" in name else instruction.is_multiply_add
                    counts[name].multiply_adds += times * useful
        return dict(counts)

    def _extent(self, maps: str) -> tuple[int, int]:
        """Where the module lay in the process."""
        name = self.arm.module().name
        found = [
            [int(bound, 16) for bound in line.split()[0].split("-")] for line in maps.splitlines() if name in line
        ]
        assert found, f"{name} is not in the memory map"
        return min(begin for begin, _ in found), max(end for _, end in found)

    def product(self, m: int, n: int, k: int, kind: str) -> dict[str, Count]:
        """Counts of one call of matmul: two calls less one."""
        words = ["-c", PRODUCT, *map(str, (m, n, k)), kind]
        return difference(self.run(*words, "1"), self.run(*words, "2"))


def difference(once: dict[str, Count], twice: dict[str, Count]) -> dict[str, Count]:
    """What the second run executed beyond the first."""
    return {
        name: Count(
            count.instructions - once.get(name, Count()).instructions,
            count.multiply_adds - once.get(name, Count()).multiply_adds,
        )
        for name, count in twice.items()
        if count.instructions > once.get(name, Count()).instructions
    }


def total(counts: dict[str, Count]) -> Count:
    """All functions together."""
    return Count(sum(c.instructions for c in counts.values()), sum(c.multiply_adds for c in counts.values()))


def bounds(counts: dict[str, Count], m: int, n: int, k: int) -> dict[str, dict[str, float]]:
    """Cycles of one A64FX core that each bound gives each part of a product whose execution was counted."""
    packing_bytes, result_bytes = 4.0 * (m * k + k * n), 8.0 * m * n * -(-k // 256)
    tile = [count for name, count in counts.items() if "matmul_tile" in name]
    packing = sum(count.instructions for name, count in counts.items() if "::pack_a" in name)
    instructions = sum(count.instructions for count in tile)
    return {
        "tile": {
            "multiply-adds": sum(count.multiply_adds for count in tile) / FMLA_RATE,
            "issue": instructions / TILE_RATE,
            "memory": result_bytes / BYTES_PER_CYCLE,
        },
        "packing": {"issue": packing / OTHER_RATE, "memory": packing_bytes / BYTES_PER_CYCLE},
        "rest": {"issue": (total(counts).instructions - instructions - packing) / OTHER_RATE},
    }


def predicted_cycles(counts: dict[str, Count], m: int, n: int, k: int) -> float:
    """The worst bound of each part, added up; see the module's docstring."""
    return sum(max(part.values()) for part in bounds(counts, m, n, k).values())


def binding(counts: dict[str, Count], m: int, n: int, k: int) -> str:
    """What binds the tile and what the packing."""
    parts = bounds(counts, m, n, k)
    return ", ".join(max(parts[name], key=parts[name].__getitem__) for name in ("tile", "packing"))


def share_of_peak(counts: dict[str, Count], m: int, n: int, k: int) -> float:
    """Useful multiply-adds over what the predicted cycles could hold."""
    return m * n * k / LANES / FMLA_RATE / predicted_cycles(counts, m, n, k)


def step(counter: Counter, folder: Path) -> dict[str, Count]:
    """Counts of one training step of the tests' GPT-2 (2 layers, hidden 24): two steps less one."""
    corpora = make_corpora(folder / "corpora")
    found = []
    for steps in (1, 2):
        config = configuration(corpora, folder / f"run{steps}", "gpt2", run__steps=steps)
        found.append(counter.run("-m", "pytrain", "train", write_toml(config, folder / f"run{steps}.toml")))
    return difference(*found)


def shapes(counter: Counter) -> Iterator[tuple[str, Count, float, str]]:
    """(name, counts, predicted share, what binds) of each shape."""
    for name, (m, n, k, kind) in SHAPES.items():
        counts = counter.product(m, n, k, kind)
        yield name, total(counts), share_of_peak(counts, m, n, k), binding(counts, m, n, k)


def short(name: str) -> str:
    """A function's name without namespaces and arguments."""
    return re.sub(
        r"\(anonymous namespace\)::|pytrain::(cpu::)?|\(.*", "", name.replace("(anonymous namespace)::", "")
    )


def main(folder: Path) -> None:
    """Print the table of shapes, and the functions of a step that execute most."""
    assert shutil.which("cc"), "a C compiler is needed for the plugin"
    with tempfile.TemporaryDirectory() as scratch:
        counter = Counter(Machine(folder.resolve()), Path(scratch))
        print(
            f"{'product':<22} {'m':>5} {'n':>5} {'k':>5}    {'others per FMLA':>15} {'share of peak':>14}  "
            "what binds tile, packing"
        )
        for name, count, share, binds in shapes(counter):
            m, n, k, kind = SHAPES[name]
            others = (count.instructions - count.multiply_adds) / count.multiply_adds
            print(
                f"{name:<22} {m:>5} {n:>5} {k:>5} {kind} {others:>15.3f} {100 * share:>13.1f}%  {binds}", flush=True
            )
        counts = step(counter, Path(scratch))
        whole = total(counts)
        others = (whole.instructions - whole.multiply_adds) / whole.multiply_adds
        print(f"a step of a tiny GPT-2: {whole.instructions} instructions, {others:.2f} others per FMLA")
        for name, count in sorted(counts.items(), key=lambda entry: -entry[1].instructions)[:8]:
            print(f"    {100 * count.instructions / whole.instructions:>4.1f}%  {short(name)}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (ROOT / "tests").exists():
        sys.exit("usage, in a checkout: python -m tests.arm.counts FOLDER")
    main(Path(sys.argv[1]))
