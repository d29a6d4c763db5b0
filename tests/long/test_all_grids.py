"""Every grid of 1, 2, 4 and 8 ranks, every schedule, ZeRO stage and family, with and without sequence parallelism.

Prints a table of the worst.
"""

import itertools
import json
from pathlib import Path

import pytest

from tests.parallel.grid_worker import SHAPES, WIDE
from tests.parallel.launch import check_ranks
from tests.parallel.test_grids import PARTS, WHOLE, case_of, judge


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_all_grids(ranks: int, tmp_path: Path) -> None:
    cases = []
    for dp, pp, tp in itertools.product((1, 2, 4, 8), repeat=3):
        shapes = [WIDE] if 8 in (pp, tp) else [name for name in SHAPES if name != WIDE]
        for shape, zero, schedule, rows in itertools.product(
            shapes, (0, 1, 2, 3), ("1f1b", "gpipe", "zero-bubble", "interleaved"), (False, True)
        ):
            recompute, bucket_mb = ("none", "selective", "full")[len(cases) % 3], (WHOLE, PARTS)[len(cases) % 2]
            case = case_of((dp, pp, tp), shape, zero, schedule, recompute, rows, bucket_mb)
            turns = {key: case[key] for key in ("recompute", "bucket_mb")}
            alike = [{**other, **turns} for other in cases]
            if dp * pp * tp == ranks and case not in alike:
                cases.append(case)
    (tmp_path / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    arguments = [str(tmp_path / "cases.json"), str(tmp_path / "results.json")]
    check_ranks(ranks, "tests.parallel.grid_worker", *arguments, timeout=5400)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    for name in ("loss", "last_loss", "evaluated", "gradient", "drift"):
        worst = max(results, key=lambda result: result[name])
        print(f"{ranks} ranks, {len(results)} grids: {name} at most {worst[name]:.2e}: {worst['case']}")
    for result in results:
        judge(result)
