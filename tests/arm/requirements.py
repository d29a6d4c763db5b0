"""Prints requirements of pyproject.toml, one a line: those of the emulated machine beside pytrain, or of building it.

python tests/arm/requirements.py [--build]
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

settings = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
project = settings["project"]
if sys.argv[1:] == ["--build"]:
    print(*settings["build-system"]["requires"], sep="\n")
else:
    print(*project["dependencies"], *project["optional-dependencies"]["test"], sep="\n")
