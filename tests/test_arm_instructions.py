"""The objects of the plain Arm tables hold no bf16 instruction, which an A64FX would stop at; those of bf16 do."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.test_symbols import FLAGS, ROOT, tools

BF16 = re.compile(r"\t(bf(?:mmla|dot|cvt\w*|mlal\w*))\b")
CONTROL = "#include <arm_neon.h>\nfloat32x4_t f(float32x4_t c, bfloat16x8_t a) { return vbfmmlaq_f32(c, a, a); }\n"


def bf16_instructions(source: Path, flags: list[str], folder: Path) -> list[str]:
    """The bf16 instructions of a file compiled with these flags, as objdump prints them."""
    compiler, nm = tools("sve")
    made = folder / "table.o"
    command = [compiler, "-std=c++17", "-O3", "-fPIC", "-w", *flags, f"-I{ROOT / 'native'}", "-c", str(source)]
    subprocess.run([*command, "-o", str(made)], check=True)
    listing = [nm.removesuffix("nm") + "objdump", "-d", str(made)]
    return BF16.findall(subprocess.run(listing, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("isa", ["neon", "sve"])
def test_plain_tables_hold_no_bf16_instruction(isa: str, tmp_path: Path) -> None:
    assert bf16_instructions(ROOT / "native" / "cpu" / isa / f"{isa}.cpp", FLAGS[isa], tmp_path) == []


@pytest.mark.parametrize("isa", ["neon_bf16", "sve_bf16"])
def test_bf16_tables_multiply_by_bfmmla(isa: str, tmp_path: Path) -> None:
    """And by no other bf16 instruction: BFDOT and BFMLAL add in another order."""
    found = bf16_instructions(ROOT / "native" / "cpu" / isa / f"{isa}.cpp", FLAGS[isa], tmp_path)
    print(sorted(set(found)), found.count("bfmmla"))
    assert "bfmmla" in found
    assert not [name for name in found if name.startswith(("bfdot", "bfmlal"))]


def test_such_an_instruction_would_be_seen(tmp_path: Path) -> None:
    source = tmp_path / "control.cpp"
    source.write_text(CONTROL, encoding="utf-8")
    assert len(bf16_instructions(source, ["-march=armv8.2-a+bf16"], tmp_path)) == 1
