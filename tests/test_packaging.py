"""What an installation brings, and that it works from the checkout, from elsewhere, and without any MPI.

These tests look at the installed package through fresh interpreters; all others import `./pytrain` of the
checkout.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

BLOCK_NATIVE = """
import sys

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "pytrain._native":
            raise ImportError("libnothing.so.7: cannot open shared object file")

sys.meta_path.insert(0, Broken())
"""


def python(
    *arguments: str, folder: Path, search: Sequence[Path] = (), check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter in `folder`, with `search` as its whole PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, search))}
    found = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    if check:
        assert found.returncode == 0, found.stdout + found.stderr
    return found


def is_editable() -> bool:
    """Whether pytrain was installed with `pip install -e`."""
    origin = json.loads(metadata.distribution("pytrain").read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable"))


def benchmarks() -> list[str]:
    """The modules of bench that are commands."""
    return [
        name
        for name in module_names(ROOT / "bench")
        if re.search(r"^def main\(", (ROOT / "bench" / f"{name}.py").read_text(encoding="utf-8"), re.MULTILINE)
    ]


def module_names(folder: Path) -> list[str]:
    """Names of the modules directly in a folder."""
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def test_nothing_but_pytrain_is_installed() -> None:
    files = metadata.distribution("pytrain").files
    assert files
    tops = {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}
    editable = {name for name in tops if name.startswith("_editable_")}
    assert tops - editable == {"pytrain", f"pytrain-{VERSION}.dist-info"}


def test_installed_package_has_what_the_checkout_has(tmp_path: Path) -> None:
    benches = module_names(ROOT / "bench")
    names = [f"pytrain.{name}" for name in module_names(ROOT / "pytrain")]
    names += ["pytrain.bench", *(f"pytrain.bench.{name}" for name in benches)]
    names += ["pytrain._native", "pytrain._order", "pytrain._batch"]
    code = (
        "import sys; from importlib.util import find_spec\n"
        "print(*(name for name in sys.argv[1:] if not find_spec(name)))"
    )
    assert {"peak", "kernels", "step"} <= set(benches)
    missing = python("-c", code, *names, "bench", "tests", folder=tmp_path).stdout.split()
    # An editable installation opens the whole checkout.
    assert missing == ([] if is_editable() else ["bench", "tests"]), "not installed: run `pip install .` again?"


def test_typed_package_and_licence_are_installed(tmp_path: Path) -> None:
    package = Path(python("-c", "import pytrain; print(pytrain.__file__)", folder=tmp_path).stdout.strip()).parent
    assert (package / "py.typed").is_file()
    information = metadata.metadata("pytrain")
    assert information["License-Expression"] == "Apache-2.0"
    assert information["License-File"] == "LICENSE"


def test_checkout_runs_its_own_python_with_the_installed_native_module() -> None:
    code = "import pytrain, pytrain._native; print(pytrain.__file__); print(pytrain._native.__file__)"
    package, native = map(Path, python("-c", code, folder=ROOT).stdout.splitlines())
    assert package.parent == ROOT / "pytrain"
    assert native.parent != ROOT / "pytrain"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["info"]])
def test_commands_run_from_the_checkout_and_from_elsewhere(arguments: list[str], tmp_path: Path) -> None:
    for folder in (ROOT, tmp_path):
        shown = python("-m", "pytrain", *arguments, folder=folder).stdout
        assert "pytrain" in shown
    if arguments == ["--version"]:
        assert shown.strip() == f"pytrain {VERSION}"
    if arguments == ["info"]:
        assert "not loaded" not in shown


@pytest.mark.parametrize("module", benchmarks())
def test_each_benchmark_explains_itself_from_the_checkout(module: str) -> None:
    assert "usage" in python("-m", f"bench.{module}", "--help", folder=ROOT).stdout.lower()


def test_benchmarks_run_from_elsewhere(tmp_path: Path) -> None:
    assert "usage" in python("-m", "pytrain", "bench", "peak", "--help", folder=tmp_path).stdout.lower()


def test_broken_native_module_says_why(tmp_path: Path) -> None:
    code = f"{BLOCK_NATIVE}\nfrom pytrain.__main__ import main\nsys.exit(main(['train', 'run.toml']))"
    python("-m", "pytrain", "init", "--preset", "gpt2-tiny", "--out", "run.toml", folder=tmp_path)
    found = python("-c", code, folder=tmp_path, check=False)
    assert found.returncode == 2
    assert "libnothing.so.7: cannot open shared object file" in found.stderr
    assert "pip install" in found.stderr
    assert "Traceback" not in found.stderr


def test_only_the_mpi_transport_needs_an_mpi_library(tmp_path: Path) -> None:
    package = tmp_path / "mpi4py"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('cannot load MPI library')\n", encoding="utf-8")
    files = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "pytrain").rglob("*.py"))
    names = sorted(".".join(part for part in file.parts if part != "__init__") for file in files)
    others = [name for name in names if not name.startswith("pytrain.collectives.mpi_")]
    code = "import sys; from importlib import import_module\nfor name in sys.argv[1:]: import_module(name)"
    python("-c", code, *others, folder=tmp_path, search=(tmp_path, ROOT))


def test_versions_agree() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [VERSION]
    assert metadata.version("pytrain") == VERSION
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[Unreleased\]$", changes, re.MULTILINE)


def test_build_is_for_every_cpu_and_keeps_ieee_arithmetic() -> None:
    settings = (ROOT / "CMakeLists.txt", ROOT / "pyproject.toml")
    text = "\n".join(re.sub(r"#.*", "", path.read_text(encoding="utf-8")) for path in settings)
    assert "-ffp-contract=off" in text
    assert not re.search(r"-march=native|-mcpu=native|-ffast-math|-Ofast|-funsafe-math", text)
