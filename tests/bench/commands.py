"""Runs a benchmark in its shortest form inside the test's process, and reads what it wrote."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any


def measure(module: str, folder: Path, *options: str) -> dict[str, Any]:
    """The JSON that `python -m bench.MODULE OPTIONS --json FILE` writes."""
    path = folder / f"{module}.json"
    importlib.import_module(f"bench.{module}").main([*options, "--json", str(path)])
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert found["bench"] == module
    assert {"cpu", "governor", "threads", "load", "isa", "commit", "libraries", "date"} <= set(found["machine"])
    return found


def check_summary(values: dict[str, Any], count: int | None = None) -> None:
    """A median with its range, of positive numbers."""
    assert 0 < values["min"] <= values["median"] <= values["max"]
    assert count is None or len(values["values"]) == count
