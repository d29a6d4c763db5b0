"""`python -m bench.scaling` on a tiny model: what it runs and writes, not how fast it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.launch import LONGEST, ROOT, mpiexec

CASES = {
    "dp": {"dp"},
    "pp-interleaved": {"pp"},
}


def test_jobs_take_turns_and_the_ranks_are_compared(tmp_path: Path) -> None:
    mpiexec()  # skips where there is none
    path = tmp_path / "scaling.json"
    options = [word for case in CASES for word in ("--case", case)]
    words = ["-m", "bench.scaling", "--model", "tiny", "--rounds", "2", "--json", str(path), *options]
    ended = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=LONGEST, check=False
    )
    print(ended.stdout, ended.stderr)
    assert ended.returncode == 0
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["bench"] == "scaling"
    assert written["machine"]["cores_in_mask"] >= 2
    results = written["cases"]
    assert [result["case"] for result in results] == list(CASES)
    for result in results:
        assert result["speeds"].keys() == {"alone", "ranks", "in-turn"}
        for kind, summary in result["speeds"].items():
            speeds = summary["values"]
            assert len(speeds) == 2
            assert min(speeds) > 0
            losses = [step["loss"] for step in result["rounds"][kind]]
            assert losses == pytest.approx([step["loss"] for step in result["rounds"]["alone"]], rel=1e-4)
        pairs = zip(result["speeds"]["ranks"]["values"], result["speeds"]["alone"]["values"], strict=True)
        assert result["ratios"]["ranks"]["median"] == pytest.approx(sum(mine / alone for mine, alone in pairs) / 2)
        for kind in ("ranks", "in-turn"):
            assert CASES[result["case"]] <= result["groups"][kind].keys()
            assert len(result["waits"][kind]) == 2
            assert all(0.0 <= share < 1.0 for share in result["waits"][kind])
        if result["case"] == "dp":
            assert result["groups"]["in-turn"]["dp"]["hidden_s"] == 0.0 < result["groups"]["ranks"]["dp"]["hidden_s"]
        assert f"{result['case']}: {result['tokens']} tokens a step" in ended.stdout
        assert f"(target {result['target']:.2f}: " in ended.stdout
