"""A checkpoint is the single-process model: what one grid saves, every other loads and saves again byte for byte."""

import json
from pathlib import Path

import pytest

from pytrain.config import resolved_toml
from tests import runs
from tests.parallel.launch import check_ranks

GRIDS = [
    {},
    {"dp": 2, "tp": 2, "zero": 2},
    {"pp": 4, "schedule": "zero-bubble"},
    {"dp": 4, "zero": 3},
    {"dp": 2, "pp": 2, "schedule": "interleaved", "chunks": 2, "zero": 1},
    {"pp": 2, "tp": 2},
]


@pytest.mark.parametrize(("family", "dtype"), [("gpt2", "fp32"), ("llama", "bf16")])
def test_every_grid_loads_what_every_other_saved(family: str, dtype: str, tmp_path: Path) -> None:
    corpora = runs.make_corpora(tmp_path / "corpora")
    config = runs.configuration(
        corpora,
        tmp_path / "unused",
        family,
        model__layers=5,
        run__steps=3,
        batch__micro_batch=1,
        batch__global_batch=8,
        evaluation__every=0,
        checkpoint__every=0,
        precision__dtype=dtype,
    )
    (tmp_path / "run.toml").write_text(resolved_toml(config), encoding="utf-8")
    (tmp_path / "grids.json").write_text(json.dumps(GRIDS), encoding="utf-8")
    arguments = [str(tmp_path / "run.toml"), str(tmp_path / "runs"), str(tmp_path / "grids.json")]
    *opened, done = check_ranks(4, "tests.parallel.reshard_worker", *arguments).strip().splitlines()
    assert done == "done"
    # Only the stages that embed tokens or take the loss open the data.
    assert opened[2] == "opened 2 [true, false, false, true]"
    assert [line.count("false") for line in opened] == [0, 0, 2, 0, 0, 0]
    for one in range(len(GRIDS)):
        saved = tmp_path / f"runs/from-{one}/checkpoints/step-000003"
        names = sorted(path.name for path in saved.glob("*.safetensors"))
        assert len(names) == 2 * 7  # embedding, five layers, head: weights and optimizer each
        for other in range(len(GRIDS)):
            again = tmp_path / f"runs/from-{one}-to-{other}/checkpoints/step-000003"
            for name in names:
                assert (saved / name).read_bytes() == (again / name).read_bytes(), (GRIDS[one], GRIDS[other], name)
