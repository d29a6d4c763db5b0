"""The arrows of the design: imports and includes go only downward, and `import pytrain` is light."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the top to the bottom. A unit (a module of pytrain, or a whole package in it) imports only units of
# lower lines.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("bench", "demo"),
    ("train",),
    ("estimate",),
    ("inputs",),
    ("evaluate", "saving"),
    ("resuming",),
    ("rank",),
    ("generate", "record", "training_state"),
    ("engine",),
    ("feeding",),
    ("optimizer",),
    ("passes",),
    ("pinned",),
    ("residency",),
    ("zero",),
    ("wire_format",),
    ("partial_gradients", "slices"),
    ("parallel",),
    ("schedule", "stage"),
    ("launch",),
    ("collectives",),
    ("buckets", "grid"),
    ("checkpoint",),
    ("data", "learning_rate", "progress"),
    ("metrics",),
    ("flops",),
    ("config",),
    ("presets",),
    ("information", "loss_scale", "stopping", "suggest"),
    ("native",),
    ("errors",),
    ("_native", "_order", "_batch"),
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

HEAVY = (
    "click",
    "hypothesis",
    "mpi4py",
    "numpy",
    "pydantic",
    "rich",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "torch",
    "zstandard",
)


def python_sources() -> dict[str, Path]:
    """Module name -> file, of pytrain and of bench, which is installed as pytrain.bench."""
    found = {}
    for folder, prefix in ((ROOT / "pytrain", "pytrain"), (ROOT / "bench", "pytrain.bench")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((prefix, *(part for part in parts if part != "__init__")))] = path
    for compiled in LAYERS[-1]:
        found[f"pytrain.{compiled}"] = ROOT / "pytrain" / f"{compiled}.pyi"
    return found


def imports(module: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the project that a file imports anywhere in it, for types or when called included."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, (*package.split(".")[: 1 - node.level or None], base)))
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target.split(".")[0] == "bench":
                target = f"pytrain.{target}"
            if target.split(".")[0] == "pytrain":
                yield target if target in known or "." not in target else target.rpartition(".")[0]


def unit(module: str) -> str:
    """The unit that a module belongs to: its name below pytrain."""
    return module.split(".")[1]


# The package's own __init__ is the façade over everything: it names all and nobody may import it.
SOURCES = python_sources()
GRAPH = {
    module: sorted(set(imports(module, path, SOURCES)) - {module})
    for module, path in SOURCES.items()
    if module != "pytrain" and path.is_file()
}


@pytest.mark.parametrize("module", GRAPH)
def test_imports_go_downward(module: str) -> None:
    own = unit(module)
    assert own in LEVEL, f"{module} has no place in LAYERS yet"
    for target in GRAPH[module]:
        assert target != "pytrain", f"{module} imports the façade: import the module that defines the name"
        other = unit(target)
        assert other in LEVEL, f"{module} imports {target}, which does not exist or has no place in LAYERS"
        assert own == other or LEVEL[other] > LEVEL[own], f"{module} imports {target}, not below it"


def test_no_import_goes_round() -> None:
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError with the cycle


def test_import_is_light() -> None:
    code = f"import sys, pytrain; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


# --- the native side -----------------------------------------------------------------------------------

# Which folders (or files) of native/ each may include.
INCLUDES = {
    "core": {"core", "device.h"},
    "device.h": {"core"},
    "cpu": {"core", "cpu", "device.h"},
    "hip": {"core", "hip", "device.h", "shim"},  # the shim stands in tests/hip, for builds that are for tests alone
    "model": {"core", "model", "device.h"},
    "bindings": {"bindings", "build_information.h", "core", "cpu", "device.h", "hip", "model"},
}
ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "neon", "neon_bf16", "sve", "sve_bf16")
# An instruction set that starts from another's table may use its files: it has all of its instructions.
EXTENDED = {"avx512_bf16": "avx512", "neon_bf16": "neon", "sve_bf16": "sve"}
# An inline template of the standard library would leave an object file built for one instruction set as a
# weak symbol, which the linker may keep for every CPU: only headers without templates.
ISA_SYSTEM_HEADERS = {
    "arm_bf16.h",
    "arm_neon.h",
    "arm_sve.h",
    "cmath",
    "cstddef",
    "cstdint",
    "cstring",
    "immintrin.h",
}
ISA_HEADERS = re.compile(r"core/(dtype|half)\.h|cpu/kernels\.h|cpu/generic/\w+\.(h|inl)")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def native_includes() -> Iterator[tuple[str, bool, str]]:
    """(file below native/, whether a system header, what it includes)."""
    native = ROOT / "native"
    for path in sorted(native.rglob("*")):
        if path.suffix in (".h", ".cpp", ".inl", ".hip"):
            for bracket, name in INCLUDE.findall(path.read_text(encoding="utf-8")):
                yield path.relative_to(native).as_posix(), bracket == "<", name


def test_includes_follow_the_arrows() -> None:
    own_includes = [(file, name) for file, system, name in native_includes() if not system]
    assert own_includes
    wrong = [
        f"{file} includes {name}"
        for file, name in own_includes
        if name.split("/")[0] not in INCLUDES[file.split("/")[0]]
    ]
    assert wrong == []


def test_instruction_set_files_include_no_templates_and_no_layers() -> None:
    wrong, seen = [], 0
    for file, system, name in native_includes():
        folder = file.removeprefix("cpu/").split("/")[0]
        if not file.startswith("cpu/") or folder not in (*ISAS, "generic"):
            continue
        seen += 1
        allowed = (
            name in ISA_SYSTEM_HEADERS
            if system
            else ISA_HEADERS.fullmatch(name)
            or (folder != "generic" and name.split("/")[:-1] in (["cpu", folder], ["cpu", EXTENDED.get(folder)]))
        )
        if not allowed:
            wrong.append(f"{file} includes {name}")
    assert seen > 0
    assert wrong == []
