"""At start and resume rank 0 alone reads what all must know, and only stages that need tokens open the data."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pytrain.config import resolved_toml
from pytrain.errors import ExitCode
from tests import runs
from tests.parallel.launch import check_ranks, run_ranks

ROOT_ALONE = {
    *("run.toml", "map.txt", "table.json", "corpora/tokenizer.model"),
    *(f"corpora/{name}.{ending}" for name in ("train", "more", "heldout") for ending in ("idx", "json")),
}
DATA = {f"corpora/{name}.bin" for name in ("train", "more", "heldout")}
GRIDS: list[tuple[dict[str, int], list[int]]] = [
    ({"pp": 4}, [0, 3]),
    ({"dp": 2, "pp": 2}, [0, 1, 2, 3]),
    ({"pp": 3}, [0, 2]),
]


def write_run(folder: Path, grid: dict[str, int]) -> None:
    corpora = runs.make_corpora(folder / "corpora")
    places = [f"{d} {p} 0\n" for d in range(grid.get("dp", 1)) for p in range(grid["pp"])]
    (folder / "map.txt").write_text("".join(places), encoding="utf-8")
    table: dict[str, Any] = {"format": 1, "machine": "", "measured": []}
    (folder / "table.json").write_text(json.dumps(table), encoding="utf-8")
    config = runs.configuration(
        corpora,
        folder / "run",
        model__layers=4,
        run__steps=2,
        data__train=[str(corpora.folder / name) for name in ("train", "more")],
        batch__micro_batch=1,
        evaluation__every=2,
        parallel__rank_map=str(folder / "map.txt"),
        collectives__table=str(folder / "table.json"),
        **{f"parallel__{axis}": size for axis, size in grid.items()},
    )
    (folder / "run.toml").write_text(resolved_toml(config), encoding="utf-8")


def opened(folder: Path, ranks: int, *words: str) -> list[Counter[str]]:
    """How often each rank opened each file."""
    report = folder.parent / "opened"
    check_ranks(ranks, "tests.parallel.opens_worker", str(folder), str(report), *words)
    return [Counter(json.loads(Path(f"{report}-{rank}.json").read_text("utf-8"))) for rank in range(ranks)]


@pytest.mark.parametrize(("grid", "readers"), GRIDS, ids=lambda value: json.dumps(value))
def test_who_opens_what(grid: dict[str, int], readers: list[int], tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    write_run(folder, grid)
    ranks = grid.get("dp", 1) * grid["pp"]
    train = ["train", str(folder / "run.toml"), "--resume", "auto"]
    for steps, resuming in ((2, False), (3, True)):
        found = opened(folder, ranks, *train, "--set", f"run.steps={steps}")
        assert found[0].keys() >= ROOT_ALONE
        assert found[0]["run.toml"] == found[0]["map.txt"] == 1
        assert [rank for rank in range(ranks) if found[rank].keys() & DATA] == readers
        for rank in readers:
            assert all(found[rank][name] == 1 for name in DATA) or rank == 0, "mapped once, and read in place"
        for files in found[1:]:
            others = files.keys() - DATA
            assert all(name.startswith("run/checkpoints/") for name in others), others
            assert {Path(name).suffix for name in others} <= {".safetensors", ""}, "its own part of a checkpoint"
        read = {name for name in found[0] if name.startswith("run/checkpoints/step-000002/")}
        assert ("run/checkpoints/step-000002/manifest.json" in read) == resuming
        if resuming and "dp" not in grid:  # every stage reads the files of its own layers
            layers = [{name for name in files if "step-000002/layer" in name} for files in found]
            assert sum(map(len, layers)) == len(set().union(*layers)) > 0


def test_a_corpus_that_is_missing_is_refused_once_by_all(tmp_path: Path) -> None:
    """The middle stages open nothing, and must hear of it all the same."""
    folder = tmp_path / "files"
    folder.mkdir()
    write_run(folder, {"pp": 3})
    (folder / "corpora" / "more.idx").unlink()
    ended = run_ranks(3, "pytrain", "train", str(folder / "run.toml"))
    assert ended.status == ExitCode.BAD_INPUT
    said = [line for line in ended.output.splitlines() if line.startswith("error: ")]  # launchers say more
    assert len(said) == 1
    assert said[0].startswith(f"error: {folder}/corpora/more.idx does not exist")
    shutil.copy(folder / "corpora" / "train.idx", folder / "corpora" / "more.idx")
    ended = run_ranks(3, "pytrain", "train", str(folder / "run.toml"))
    assert ended.status == ExitCode.BAD_INPUT
    assert ended.output.count("more.bin has ") == 1
