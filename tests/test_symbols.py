"""Files built for one instruction set keep everything to themselves.

An inline function that an AVX-512 file lets out is a weak symbol, which the linker may keep for all: the
program then stops with an illegal instruction on every other CPU. So such a file has one symbol, its strong
`fill_<isa>`.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARM = ("neon", "neon_bf16", "sve", "sve_bf16")
CROSS = {True: "aarch64-linux-gnu-", False: "x86_64-linux-gnu-"}
"""Where the tools for the other architecture are, as Debian names them: for Arm, and not."""
# What the compiler itself may call for a loop, a square root or its own checks.
RUNTIME = {"memcpy", "memset", "memmove", "sqrt", "sqrtf", "_GLOBAL_OFFSET_TABLE_", "__stack_chk_fail"}


def isa_flags() -> dict[str, list[str]]:
    """The flags of each instruction set, as CMakeLists.txt has them."""
    text = (ROOT / "CMakeLists.txt").read_text()
    declared = re.findall(r'pytrain_isa\((\w+) "([^"]*)"', text)
    return {"scalar": []} | {name: shlex.split(flags) for name, flags in declared}


FLAGS = isa_flags()


def tools(isa: str) -> tuple[str, str]:
    """The C++ compiler and the nm for an instruction set, this machine's or a cross-compiler's."""
    arm = isa in ARM
    if isa == "scalar" or arm == (platform.machine() == "aarch64"):
        found = shutil.which(os.environ.get("CXX", "c++")), shutil.which("nm")
    else:
        found = shutil.which(f"{CROSS[arm]}g++"), shutil.which(f"{CROSS[arm]}nm")
    if found[0] is None or found[1] is None:
        pytest.skip(f"no compiler for {isa} here")
    return found[0], found[1]


def symbols(isa: str, level: str, folder: Path) -> list[tuple[str, str]]:
    """(type, name) of each symbol that is not local, as nm prints them."""
    compiler, nm = tools(isa)
    source = ROOT / "native" / "cpu" / isa / f"{isa}.cpp"
    compiled = folder / f"{isa}.o"
    command = [
        compiler,
        "-std=c++17",
        level,
        "-fPIC",
        "-ffp-contract=off",
        "-fno-exceptions",
        "-fno-rtti",
        "-w",
    ]
    command += [*FLAGS[isa], f"-I{ROOT / 'native'}", "-c", str(source), "-o", str(compiled)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0 and "unrecognized command-line option" in result.stderr:
        pytest.skip(f"{compiler} cannot build for {isa}")
    assert result.returncode == 0, result.stderr
    listing = subprocess.run([nm, str(compiled)], capture_output=True, text=True, check=True).stdout
    found = [(words[-2], words[-1]) for words in map(str.split, listing.splitlines())]
    return [(kind, name) for kind, name in found if not kind.islower() or kind in "wvu"]


def test_cmake_declares_the_instruction_sets() -> None:
    assert {"avx2", "avx512", *ARM} <= set(FLAGS)


@pytest.mark.parametrize("level", ["-O0", "-O3"])  # without optimisation nothing is inlined away
@pytest.mark.parametrize("isa", FLAGS)
def test_one_strong_symbol_and_no_weak_one(isa: str, level: str, tmp_path: Path) -> None:
    found = symbols(isa, level, tmp_path)
    undefined = {name for kind, name in found if kind == "U"}
    defined = [(kind, name) for kind, name in found if kind != "U"]
    assert len(defined) == 1, f"{isa}.cpp must define one symbol, not {defined}"
    kind, name = defined[0]
    assert kind == "T"
    assert f"fill_{isa}" in name
    assert undefined <= RUNTIME, f"{isa}.cpp calls what another file defines: {undefined - RUNTIME}"
