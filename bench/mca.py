"""How near the Arm kernels are to the limit of a core, by LLVM's model of it: no Arm machine is needed.

    python -m bench.mca
    python -m bench.mca --json mca.json --object build-arm/_native.cpython-311-aarch64-linux-gnu.so

The inner loop of each kernel is taken out of the built object (by default the sources of this checkout, compiled
with the flags of CMakeLists.txt) and given to llvm-mca, which counts the cycles of a core whose loads all hit the
first-level cache. A whole tile, for attention, is its loop as often as `steps` want plus all that comes before and
after it, not overlapped. A chain of fp16 multiply-adds is all between two flushes and the flush, one after another:
the flush of one overlaps with the next as far as the core's buffers let it.
"bound" names what takes the cycles: the busiest pipes, the decoders, or, where neither explains them, latency.

Needs llvm-mca and llvm-objdump (14 or newer knows a64fx, 15 neoverse-v1, 19 neoverse-v2).
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from pytrain.errors import UserError

from . import _record

ROOT = Path(__file__).resolve().parent.parent
NEWEST_LLVM, OLDEST_LLVM = 25, 14
ITERATIONS = 200
CHAINS = 8
ACCUMULATORS = 24
"""Multiply-adds of one step of k in a tile, of NEON and of SVE."""


@dataclass(frozen=True)
class Cpu:
    """A core as llvm-mca knows it. `decode`: instructions per cycle; LLVM's model of the A64FX has 6, the core 4."""

    name: str
    table: str
    decode: int
    vector_pipes: int
    bf16: bool = False
    """Whether it has BFMMLA, and so the table's products of bf16."""


CPUS = {
    cpu.name: cpu
    for cpu in (
        Cpu("a64fx", "sve", 4, 2),
        Cpu("neoverse-n1", "neon", 4, 2),
        Cpu("neoverse-v1", "sve", 8, 2, True),  # 256-bit vectors: two of its four pipes at a time
        Cpu("neoverse-v2", "sve", 8, 4, True),
    )
}


@dataclass(frozen=True)
class Kernel:
    """A function whose loop with most multiply-adds is looked at; with `steps`, the whole function with so many."""

    title: str
    function: str
    steps: int = 0
    tables: tuple[str, ...] = ("neon", "sve")
    chained: bool = False
    """Whether `steps` are one round of the loop around the inner one, which begins and flushes a chain."""
    bf16: bool = False
    """Whether it is of the table that adds products of bf16: its multiply-adds are BFMMLA, each worth four."""

    def table_on(self, cpu: Cpu) -> str:
        """The table it is taken from; none ("") where the core lacks it."""
        if cpu.table not in self.tables or (self.bf16 and not cpu.bf16):
            return ""
        return f"{cpu.table}_bf16" if self.bf16 else cpu.table


KERNELS = (
    Kernel("matmul_tile", "matmul_tile"),
    Kernel("attention scores, head size 64", "matmul_tile", 64),
    Kernel("attention scores, head size 128", "matmul_tile", 128),
    Kernel("attention scores, head size 144", "matmul_tile", 144),
    Kernel("attention values, 128 keys", "matmul_tile", 128),
    Kernel("fp16 chain of 64 with its flush", "matmul_tile_chains", 64, ("sve",), True),
    Kernel("bf16 matmul_tile", "matmul_tile", bf16=True),
    Kernel("bf16 attention scores, head size 128", "matmul_tile", 128 // 4, bf16=True),
    Kernel("bf16 attention values, 120 keys", "matmul_tile", 120 // 4, bf16=True),
    Kernel("peak_flops", "peak_flops"),
    Kernel("bf16 peak_flops", "peak_flops", bf16=True),
    Kernel("adamw", "adamw_row"),
    Kernel("gelu_forward", "gelu_forward_row"),
    Kernel("exp_sum", "exp_sum_row"),
)


@dataclass(frozen=True)
class Result:
    """What --json writes: per iteration of the loop, or, for a whole tile, per tile."""

    cpu: str
    kernel: str
    fmla_per_cycle: float
    cycles: float
    bound: str


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly; `target` is the address that a branch goes to."""

    address: int
    text: str
    target: int | None

    @property
    def is_multiply_add(self) -> bool:
        """Whether it is a fused multiply-add on vectors."""
        return re.match(r"(fmla|fmls|fmad|fmsb|fnmls|fnmla|fnmad|fnmsb|bfmmla)\b.*[zv]\d", self.text) is not None

    @property
    def multiplies(self) -> bool:
        """Whether it multiplies vectors: a multiply-add, or the product that begins a sum."""
        return self.is_multiply_add or re.match(r"fmul\b.*[zv]\d", self.text) is not None


def tool(name: str) -> str:
    """Path of the newest LLVM tool of this name.

    Raises:
        UserError: none is installed.
    """
    for version in range(NEWEST_LLVM, OLDEST_LLVM - 1, -1):
        if found := shutil.which(f"{name}-{version}"):
            return found
    if found := shutil.which(name):
        return found
    raise UserError(f"{name} is not installed: on Debian, `apt-get install llvm-19` brings it")


def compile_table(table: str, folder: Path) -> Path:
    """Object file of an instruction set's table, built as CMakeLists.txt builds it, for 64-bit Arm.

    Raises:
        UserError: no compiler for 64-bit Arm is installed, or this is no checkout.
    """
    lists = ROOT / "CMakeLists.txt"
    if not lists.exists():
        raise UserError("bench.mca: no sources here to compile; name a built module with --object")
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        raise UserError("bench.mca: aarch64-linux-gnu-g++ is not installed; name a built module with --object")
    flags = re.search(rf'pytrain_isa\({table} "([^"]*)"', lists.read_text(encoding="utf-8"))
    assert flags is not None, f"CMakeLists.txt no longer builds {table}"
    made = folder / f"{table}.o"
    command = [
        *(compiler, "-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-ffp-contract=off"),
        *("-fno-math-errno", "-fno-exceptions", "-fno-rtti", *shlex.split(flags[1])),
        *(f"-I{ROOT / 'native'}", "-c", str(ROOT / "native" / "cpu" / table / f"{table}.cpp"), "-o", str(made)),
    ]
    subprocess.run(command, check=True)
    return made


def disassemble(binary: Path) -> dict[str, list[Instruction]]:
    """Instructions of each function of an object or module, by its whole name."""
    command = [tool("llvm-objdump"), "-d", "--demangle", "--no-show-raw-insn", "--mattr=+sve,+bf16", str(binary)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    functions: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in listing.splitlines():
        if title := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            body = functions.setdefault(title[1], [])
        elif instruction := re.match(r"\s*([0-9a-f]+):\s+(.*)", line):
            text = instruction[2].split("//")[0].strip()
            branch = re.match(r"(?:b|b\.\w+|cbn?z .*|tbn?z .*)\s.*?(0x[0-9a-f]+) <", text.replace("\t", " "))
            target = int(branch[1], 16) if branch else None
            body.append(Instruction(int(instruction[1], 16), text.replace("\t", " "), target))
    return functions


def find_function(functions: dict[str, list[Instruction]], table: str, name: str) -> list[Instruction]:
    """The body of a table's function; of one that is written for each storage type, that of fp32.

    Raises:
        UserError: the object has none of that name.
    """
    for title, body in functions.items():
        if re.search(rf"\bcpu::{table}::\(anonymous namespace\)::{name}(<[^<>]*::Fp32>)?\(", title):
            return body
    raise UserError(f"bench.mca: the object has no function {name} of the {table} table (is it stripped?)")


def inner_loop(body: list[Instruction]) -> tuple[int, int]:
    """First and last index of the innermost loop with most multiply-adds; the longest where none has any."""
    places = {instruction.address: index for index, instruction in enumerate(body)}
    loops = [
        (places[instruction.target], index)
        for index, instruction in enumerate(body)
        if instruction.target is not None and places.get(instruction.target, index + 1) <= index
    ]
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    assert innermost, "the function has no loop"
    return max(
        innermost,
        key=lambda loop: (sum(i.is_multiply_add for i in body[loop[0] : loop[1] + 1]), loop[1] - loop[0]),
    )


def outer_loop(body: list[Instruction], inner: tuple[int, int]) -> tuple[int, int]:
    """First and last index of the smallest loop around another one."""
    places = {instruction.address: index for index, instruction in enumerate(body)}
    loops = [
        (places[instruction.target], index)
        for index, instruction in enumerate(body)
        if instruction.target in places and places[instruction.target] < inner[0] and index > inner[1]
    ]
    assert loops, "there is no loop around the inner one"
    return min(loops, key=lambda loop: loop[1] - loop[0])


def straight(code: list[Instruction]) -> list[Instruction]:
    """The instructions of a piece of code without its branches."""
    return [instruction for instruction in code if instruction.target is None and instruction.text != "ret"]


def analyse(cpu: Cpu, code: list[Instruction], iterations: int) -> dict[str, Any]:
    """llvm-mca's report on these instructions, repeated so often."""
    lines = [".arch armv8.2-a+sve+bf16", "loop:"]
    for instruction in code:
        lines.append(re.sub(r"0x[0-9a-f]+ <.*>", "loop", instruction.text))
    command = [
        *(tool("llvm-mca"), "-mtriple=aarch64-linux-gnu", f"-mcpu={cpu.name}", f"-dispatch={cpu.decode}"),
        *(f"-iterations={iterations}", "-json", "-"),
    ]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"bench.mca: {command[0]} cannot model {cpu.name}: {done.stderr.strip().splitlines()[-1]}")
    report: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return report


def cycles_of(cpu: Cpu, code: list[Instruction], iterations: int) -> tuple[float, str]:
    """Cycles per repetition, and what takes them."""
    if not code:
        return 0.0, ""
    report = analyse(cpu, code, iterations)
    region = report["CodeRegions"][0]
    cycles = region["SummaryView"]["TotalCycles"] / iterations
    names = report["TargetInfo"]["Resources"]
    pressure = {
        names[entry["ResourceIndex"]]: entry["ResourceUsage"]
        for entry in region["ResourcePressureView"]["ResourcePressureInfo"]
        if entry["InstructionIndex"] == len(code)
    }
    busiest = max(pressure.values(), default=0.0)
    decode = len(code) / cpu.decode
    if cycles > 1.1 * max(busiest, decode):
        return cycles, "latency"
    if decode > busiest:
        return cycles, "decode"
    return cycles, "pipes " + "+".join(sorted(name for name, use in pressure.items() if use > 0.99 * busiest))


def examine(cpu: Cpu, kernel: Kernel, functions: dict[str, list[Instruction]]) -> Result:
    """One kernel on one core."""
    body = find_function(functions, kernel.table_on(cpu), kernel.function)
    first, last = inner_loop(body)
    loop = body[first : last + 1]
    cycles, bound = cycles_of(cpu, loop, ITERATIONS)
    count = sum(instruction.is_multiply_add for instruction in loop)
    if kernel.steps:
        begin, end = outer_loop(body, (first, last)) if kernel.chained else (0, len(body) - 1)
        before, after = straight(body[begin:first]), straight(body[last + 1 : end + 1])
        done = sum(instruction.multiplies for instruction in (*before, *after))
        rounds = (kernel.steps * ACCUMULATORS - done) / count
        count = kernel.steps * ACCUMULATORS
        if kernel.chained:
            assert rounds == int(rounds), "a chain is whole rounds of the inner loop"
            cycles, bound = cycles_of(cpu, before + int(rounds) * loop + after, CHAINS)
        else:
            cycles = rounds * cycles + cycles_of(cpu, before + after, 1)[0]
    return Result(cpu.name, kernel.title, round(count / cycles, 3), round(cycles, 2), bound)


def results(cpus: list[str], binary: Path | None = None) -> list[Result]:
    """Every kernel on each of these cores (names of CPUS), from `binary` or from this checkout's sources."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in cpus:
            cpu = CPUS[name]
            kernels = [kernel for kernel in KERNELS if kernel.table_on(cpu)]
            tables = {kernel.table_on(cpu) for kernel in kernels}
            functions = {table: disassemble(binary or compile_table(table, Path(folder))) for table in tables}
            found += [examine(cpu, kernel, functions[kernel.table_on(cpu)]) for kernel in kernels]
    return found


@click.command()
@click.option("--cpu", "cpus", multiple=True, type=click.Choice(list(CPUS)), help="Default: all.")
@click.option("--object", "binary", type=click.Path(path_type=Path, exists=True), help="A built object or module.")
@click.option("--json", "output", type=click.Path(path_type=Path), metavar="FILE", callback=_record.writable,
              help="Also write the table to this file.")  # fmt: skip
def command(cpus: tuple[str, ...], binary: Path | None, output: Path | None) -> None:
    """Model the inner loops of the Arm kernels."""
    found = results(list(cpus or CPUS), binary)
    print(f"{'core':<12} {'kernel':<36} {'cycles':>9} {'FMLA/cycle':>11} {'of':>3}  bound")
    for result in found:
        pipes = CPUS[result.cpu].vector_pipes
        print(
            f"{result.cpu:<12} {result.kernel:<36} {result.cycles:>9.1f} {result.fmla_per_cycle:>11.2f} "
            f"{pipes:>3}  {result.bound}"
        )
    if output is not None:
        output.write_text(json.dumps([asdict(result) for result in found], indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench mca` does."""
    command.main(arguments, prog_name="pytrain bench mca", standalone_mode=False)


if __name__ == "__main__":
    _record.start(command, "python -m bench.mca")
