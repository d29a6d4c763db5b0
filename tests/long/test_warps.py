"""What nvcc compiles, run on the CPU: the tests of tests/hip with the shim's warps of 32 lanes.

Builds a native module of its own for it (a few minutes).
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_waves_of_two_warps(tmp_path: Path) -> None:
    environment = {**os.environ, "SKBUILD_CMAKE_DEFINE": "PYTRAIN_WERROR=ON;PYTRAIN_HIP=SHIM;PYTRAIN_SHIM_LANES=32"}
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    install += ["--target", str(tmp_path / "shim"), "-C", f"build-dir={tmp_path / 'build'}", "."]
    subprocess.run(install, cwd=ROOT, env=environment, check=True)
    environment["PYTHONPATH"] = str(tmp_path / "shim")
    check = "import sys; from pytrain import _native; sys.exit(_native.hip_shim.lanes != 32)"
    subprocess.run([sys.executable, "-c", check], cwd=tmp_path, env=environment, check=True)
    # The object for gfx90a is not what runs here.
    tests = [sys.executable, "-m", "pytest", "-q", "tests/hip", "--ignore=tests/hip/test_gfx90a.py"]
    subprocess.run(tests, cwd=ROOT, env=environment, check=True)
