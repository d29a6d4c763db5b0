"""What the compiler makes of the HIP kernels for MI250X, without a GPU: registers, LDS, spills, occupancy, ceilings.

Every kernel file of native/hip/kernels is compiled for gfx90a; the compiler's resource report and the assembly are
read. FLOPs, bytes and the ceiling that binds are those of a typical call (4096 rows of width 4096, sequences of 2048,
heads of 128, a vocabulary of 50,000). `llvm-mca` gives the cycles of the product's inner loop: `mfma_share` is the
part of them in which the matrix unit works, for the waves that a SIMD holds at once (the loop of one wave waits for
LDS and barriers while another multiplies); `alone` is that of one wave.

    python -m bench.hip [--json FILE] [--build FOLDER] [--architecture gfx942]

gfx942 (MI300) takes clang 19 (`apt-get install clang-19 llvm-19`). HIP's headers and device libraries stay those of
5.2, which have no file for it: that of gfx90a stands in, which tells the mathematical functions what both have.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from pytrain.errors import ExitCode, UserError

from . import _record

NATIVE = Path(__file__).resolve().parent.parent / "native"
BUILD = NATIVE.parent / "build" / "gfx90a"
ARCHITECTURE = "gfx90a"
MI300 = "gfx942"
DEVICE_LIBRARIES = Path("/usr/lib/x86_64-linux-gnu/amdgcn/bitcode")
MFMA_TFLOPS = {"bf16": 191.5, "fp16": 191.5, "fp32": 47.9}  # of one GCD of MI250X
VECTOR_TFLOPS = 23.9
TERABYTES = 1.6  # per second
FORMATS = ("bf16", "fp16", "fp32")
INSTALL = "apt-get install --no-install-recommends hipcc llvm-15, and for gfx942 clang-19 llvm-19"
REMARK = re.compile(r"remark: +([^:]+): (\S+) \[-Rpass-analysis")
COLUMNS = {
    "VGPRs": "vgprs",
    "AGPRs": "agprs",
    "ScratchSize [bytes/lane]": "scratch_bytes",
    "Occupancy [waves/SIMD]": "occupancy",
    "LDS Size [bytes/block]": "lds_bytes",
}


@dataclass
class Kernel:
    """One kernel of the compiled code."""

    symbol: str
    kernel: str
    """Readable name: function, format, and what else the template takes."""
    file: str
    vgprs: int = 0
    agprs: int = 0
    lds_bytes: int = 0
    """Per block."""
    scratch_bytes: int = 0
    """Per lane: what was spilled to memory."""
    occupancy: int = 0
    """Waves that a SIMD holds at once."""
    mfma: int = 0
    """Matrix instructions in the code."""
    wide_loads: int = 0
    """16-byte global loads in the code."""
    flat: int = 0
    """Loads and stores whose address space the compiler does not know."""
    mfma_share: float | None = None
    alone: float | None = None


def tool(name: str, *alternatives: str) -> str:
    """Path of a program.

    Raises:
        UserError: it is missing; says how to install it.
    """
    for candidate in (name, *alternatives):
        found = shutil.which(candidate)
        if found is not None:
            return found
    raise UserError(f"{name} is not installed: {INSTALL}")


def model(architecture: str) -> str:
    """Path of LLVM's model of a GPU's waves."""
    return tool("llvm-mca-19" if architecture == MI300 else "llvm-mca-15", "llvm-mca")


def compiler(architecture: str, folder: Path) -> list[str]:
    """The command that compiles for this GPU."""
    if architecture != MI300:
        return [tool("hipcc")]
    clang, libraries = tool("clang-19"), folder / "device_libraries"
    if not libraries.exists():
        if not DEVICE_LIBRARIES.is_dir():
            raise UserError(f"there are no device libraries in {DEVICE_LIBRARIES}: {INSTALL}")
        partial = folder / f"device_libraries.{os.getpid()}"
        shutil.copytree(DEVICE_LIBRARIES, partial)
        shutil.copy(partial / "oclc_isa_version_90a.bc", partial / "oclc_isa_version_942.bc")
        os.replace(partial, libraries)
    return [clang, f"--rocm-device-lib-path={libraries}", "-D__HIP_PLATFORM_AMD__"]


def compile_file(path: Path, folder: Path, architecture: str = ARCHITECTURE) -> Path:
    """Assembly of one kernel file, and the resource report beside it; made anew only if a source has changed."""
    digest = hashlib.sha256()
    for source in (path, *sorted((NATIVE / "hip").glob("*.h")), *sorted((NATIVE / "core").glob("*.h"))):
        digest.update(source.read_bytes())
    assembly = folder / f"{path.stem}-{digest.hexdigest()[:16]}.s"
    if assembly.exists():
        return assembly
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *compiler(architecture, folder), f"--offload-arch={architecture}", "-O3", "-std=c++17", "-fPIC", "-x", "hip",
        f"-I{NATIVE}", str(path), "--offload-device-only", "-S", "-o", f"{assembly}.new",
        "-Rpass-analysis=kernel-resource-usage",
    ]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, "HIP_PLATFORM": "amd"}, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"{path} does not compile for {architecture}:\n{done.stderr}")
    assembly.with_suffix(".txt").write_text(done.stderr, encoding="utf-8")
    os.replace(f"{assembly}.new", assembly)
    return assembly


def readable(symbol: str) -> str:
    """`matmul_kernel bf16 along across` for a mangled name; what a template takes follows the function."""
    match = re.match(r"_ZN7pytrain3hip(\d+)", symbol)
    assert match is not None, symbol
    start = match.end()
    name = symbol[start : start + int(match.group(1))]
    rest = symbol[start + int(match.group(1)) :]
    parts = []
    for kind, value in re.findall(r"L(NS0_6FormatE|NS0_4PartE|b|i)(\d+)E", rest):
        if kind == "NS0_6FormatE":
            parts.append(FORMATS[int(value)])
        elif kind == "NS0_4PartE":
            parts.append(("", "dk", "dv")[int(value)])
        elif kind == "b":
            parts.append("along" if value == "1" else "across")
        else:
            parts.append(value)
    return " ".join(filter(None, [name, *parts]))


def bodies(assembly: str) -> dict[str, str]:
    """The code of each kernel by symbol."""
    code = {}
    for symbol in re.findall(r"^\s*\.amdhsa_kernel (\S+)$", assembly, re.MULTILINE):
        begin = assembly.index(f"\n{symbol}:")
        code[symbol] = assembly[begin : assembly.index(".Lfunc_end", begin)]
    return code


def kernels_of(assembly: Path, architecture: str = ARCHITECTURE) -> list[Kernel]:
    """Every kernel of one compiled file."""
    report: dict[str, dict[str, int]] = {}
    symbol = ""
    for key, value in REMARK.findall(assembly.with_suffix(".txt").read_text(encoding="utf-8")):
        if key == "Function Name":
            symbol = value
            report[symbol] = {}
        elif key in COLUMNS:
            report[symbol][COLUMNS[key]] = int(value)
    found = []
    for symbol, body in bodies(assembly.read_text(encoding="utf-8")).items():
        kernel = Kernel(symbol, readable(symbol), assembly.stem.rsplit("-", 1)[0], **report[symbol])
        kernel.mfma = len(re.findall(r"\bv_mfma_", body))
        kernel.wide_loads = len(re.findall(r"\bglobal_load_dwordx4\b", body))
        kernel.flat = len(re.findall(r"\bflat_(?:load|store)", body))
        loop = inner_loop(body) if kernel.kernel.startswith("matmul_kernel") else None
        if loop is not None:
            kernel.alone = loop_share(loop, architecture)
            kernel.mfma_share = min(1.0, kernel.occupancy * kernel.alone)
        found.append(kernel)
    return found


def inner_loop(body: str) -> str | None:
    """The block that multiplies and jumps back to itself, over whole tiles: it has the most matrix instructions.

    None where the loop has a branch inside, as that of fp32 has, whose operands may be stored in 16 bits.
    """
    loops = []
    for block in re.split(r"\n(?=\.LBB\d+_\d+:)", body):
        label = block.split(":", 1)[0].strip()
        lines = [line.split(";")[0].rstrip() for line in block.splitlines()[1:]]
        lines = [line for line in lines if line.strip() and not line.strip().startswith(".")]
        for number, line in enumerate(lines):
            if re.search(rf"s_c?branch\w* {re.escape(label)}$", line):
                text = "\n".join(lines[: number + 1]) + "\n"
                loops.append((text.count("v_mfma_"), text))
                break
    return max(loops)[1] if loops else None


def loop_share(loop: str, architecture: str = ARCHITECTURE, iterations: int = 50) -> float:
    """Part of the cycles of one wave's inner loop in which it keeps the matrix unit busy, by llvm-mca."""
    command = [
        model(architecture),
        "-mtriple=amdgcn-amd-amdhsa", f"-mcpu={architecture}",
        f"-iterations={iterations}",
    ]  # fmt: skip
    done = subprocess.run(command, input=loop, capture_output=True, text=True, check=True)
    cycles = int(re.search(r"Total Cycles: +(\d+)", done.stdout).group(1))  # type: ignore[union-attr]
    busy = float(re.search(r"Block RThroughput: +([\d.]+)", done.stdout).group(1))  # type: ignore[union-attr]
    return round(busy * iterations / cycles, 3)


def kernel_files() -> list[Path]:
    """The largest first, so that two compilers end at about the same time."""
    return sorted((NATIVE / "hip" / "kernels").glob("*.hip"), key=lambda path: "attention" not in path.name)


def compile_all(folder: Path, architecture: str = ARCHITECTURE) -> list[Kernel]:
    """Every kernel of native/hip/kernels, compiled two files at a time."""
    compiler(architecture, folder)  # makes what it needs before two threads ask for it
    model(architecture)  # which is wanted after minutes, and missed at once
    with ThreadPoolExecutor(2) as pool:
        assemblies = list(pool.map(lambda path: compile_file(path, folder, architecture), kernel_files()))
    return [kernel for assembly in assemblies for kernel in kernels_of(assembly, architecture)]


ROWS, WIDTH, LENGTH, HEADS, HEAD, VOCABULARY = 4096, 4096, 2048, 32, 128, 50_000
ELEMENTS = ROWS * WIDTH
PAIRS = ROWS * LENGTH / 2 * HEADS  # visible (query, key) pairs of a causal mask
# FLOPs and bytes of a typical call by function; `size` is bytes of a stored element.
WORK: dict[str, Callable[[int], tuple[float, float]]] = {
    "matmul_kernel": lambda size: (2.0 * ROWS * WIDTH * WIDTH, 3.0 * ELEMENTS * size),
    "add_slices_kernel": lambda size: (4.0 * WIDTH * WIDTH / 16, (4.0 + 2.0) * WIDTH * WIDTH / 16 * 4),
    "attention_forward_kernel": lambda size: (4.0 * HEAD * PAIRS, 4.0 * ELEMENTS * size),
    "attention_dq_kernel": lambda size: (6.0 * HEAD * PAIRS, 6.0 * ELEMENTS * size),
    "attention_dkv_kernel": lambda size: (8.0 * HEAD * PAIRS, 6.0 * ELEMENTS * size),
    "convert_kernel": lambda size: (0.0, 2.0 * ELEMENTS * size),
    "add_kernel": lambda size: (ELEMENTS, 3.0 * ELEMENTS * size),
    "fill_kernel": lambda size: (0.0, ELEMENTS * size),
    "fill_normal_kernel": lambda size: (100.0 * ELEMENTS, ELEMENTS * size),
    "residual_add_kernel": lambda size: (2.0 * ELEMENTS, 3.0 * ELEMENTS * size),
    "gelu_forward_kernel": lambda size: (24.0 * ELEMENTS, 2.0 * ELEMENTS * size),
    "gelu_backward_kernel": lambda size: (36.0 * ELEMENTS, 4.0 * ELEMENTS * size),
    "swiglu_forward_kernel": lambda size: (21.0 * ELEMENTS, 3.0 * ELEMENTS * size),
    "swiglu_backward_kernel": lambda size: (29.0 * ELEMENTS, 6.0 * ELEMENTS * size),
    "rope_kernel": lambda size: (3.0 * ELEMENTS, 2.0 * ELEMENTS * size),
    "norm_forward_kernel": lambda size: (8.0 * ELEMENTS, 2.0 * ELEMENTS * size),
    "norm_backward_kernel": lambda size: (15.0 * ELEMENTS, 4.0 * ELEMENTS * size),
    "norm_sums_kernel": lambda size: (5.0 * ELEMENTS, 2.0 * ELEMENTS * size),
    "bias_sums_kernel": lambda size: (ELEMENTS, ELEMENTS * size),
    "add_chunks_kernel": lambda size: (64.0 * WIDTH, 64.0 * WIDTH * 4),
    "embed_forward_kernel": lambda size: (0.0, 2.0 * ELEMENTS * size),
    "embed_backward_kernel": lambda size: (ELEMENTS + 0.5 * ROWS * ROWS, 3.0 * ELEMENTS * size),
    "head_statistics_kernel": lambda size: (20.0 * ROWS * VOCABULARY, 8.0 * ROWS * VOCABULARY),
    "loss_forward_kernel": lambda size: (100.0 * ROWS, 20.0 * ROWS),
    "loss_backward_kernel": lambda size: (20.0 * ROWS * VOCABULARY, 8.0 * ROWS * VOCABULARY),
    "sum_squares_kernel": lambda size: (2.0 * ELEMENTS, 4.0 * ELEMENTS),
    "finish_sum_kernel": lambda size: (1024.0, 8192.0),
    "finish_norm_kernel": lambda size: (5.0, 40.0),
    "adamw_kernel": lambda size: (14.0 * ELEMENTS, 28.0 * ELEMENTS),
}


def ceiling(kernel: Kernel) -> tuple[float, float, str]:
    """FLOPs, bytes, and what bounds a typical call: the matrix units, the vector units or the memory."""
    name, *options = kernel.kernel.split()
    format_ = next((option for option in options if option in FORMATS), "bf16")
    flops, moved = WORK[name](4 if format_ == "fp32" else 2)
    peak = MFMA_TFLOPS[format_] if kernel.mfma else VECTOR_TFLOPS
    if flops / peak < moved / TERABYTES:
        return flops, moved, "memory"
    return flops, moved, "MFMA" if kernel.mfma else "vector"


def table(kernels: list[Kernel]) -> str:
    """One line per kernel."""
    lines = [
        f"{'kernel':42} {'VGPR':>5} {'AGPR':>5} {'LDS':>6} {'spill':>5} {'waves':>5} {'MFMA':>5} "
        f"{'GFLOP':>9} {'MB':>7} {'bound':>7} {'share':>6} {'alone':>6}"
    ]
    for kernel in kernels:
        flops, moved, bound = ceiling(kernel)
        share = "" if kernel.mfma_share is None else f"{kernel.mfma_share:.2f}"
        alone = "" if kernel.alone is None else f"{kernel.alone:.2f}"
        lines.append(
            f"{kernel.kernel:42} {kernel.vgprs:5} {kernel.agprs:5} {kernel.lds_bytes:6} {kernel.scratch_bytes:5} "
            f"{kernel.occupancy:5} {kernel.mfma:5} {flops / 1e9:9.2f} {moved / 1e6:7.1f} "
            f"{bound:>7} {share:>6} {alone:>6}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compile, print, and write the JSON file.

    Raises:
        UserError: a compiler is missing, a kernel does not compile, or the file cannot be written.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.hip", description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the list of kernels here")
    parser.add_argument(
        "--build", metavar="FOLDER", type=Path, help="keep assembly here (default: build/ and the architecture)"
    )
    parser.add_argument("--architecture", choices=(ARCHITECTURE, MI300), default=ARCHITECTURE, help="the GPU")
    options = parser.parse_args(arguments)
    _record.check_writable(options.json)
    kernels = compile_all(options.build or Path("build") / options.architecture, options.architecture)
    print(table(kernels))
    if options.architecture == MI300:
        print("registers, LDS and share are those of gfx942; 'bound' is for the ceilings of MI250X")
    print(f"ceilings of one GCD of MI250X: {MFMA_TFLOPS} TFLOP/s on the matrix units, {TERABYTES} TB/s; not measured")
    if options.json is not None:
        keys = ("kernel", "vgprs", "agprs", "lds_bytes", "scratch_bytes", "occupancy", "mfma", "mfma_share")
        rows = [{key: asdict(kernel)[key] for key in keys} for kernel in kernels]
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(int(ExitCode.BAD_INPUT))
