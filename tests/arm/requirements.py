"""Prints what the emulated machine needs beside pytrain: the requirements of pyproject.toml, one a line."""

from __future__ import annotations

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]
print(*project["dependencies"], *project["optional-dependencies"]["test"], sep="\n")
