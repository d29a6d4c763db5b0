"""The text about a checkpoint."""

import re
from pathlib import Path

import numpy as np
import pytest

from pytrain.checkpoint.inspect import inspect
from pytrain.errors import UserError
from tests.checkpoint_cases import save_random


def test_what_is_shown(tmp_path: Path) -> None:
    arrays = save_random(tmp_path, 1200, seed=4)
    text = inspect(tmp_path, norms=True, verify=True)
    assert re.search(r"^checkpoint +.*/step-001200 *$", text.replace("\n ", ""), re.MULTILINE)
    assert re.search(r"^step +1,200$", text, re.MULTILINE)
    assert re.search(r"^samples +640$", text, re.MULTILINE)
    assert re.search(r"^tokens +163,840$", text, re.MULTILINE)
    assert re.search(r"^model +family llama, layers 1$", text, re.MULTILINE)
    assert re.search(rf"^parameters +{13 * 7 + 7 + 35 + 77}$", text, re.MULTILINE)
    rms = np.sqrt(np.mean(arrays["embed.tokens"].astype(np.float64) ** 2))
    assert re.search(rf"^embed\.tokens +embed\.weights +fp32 +13 x 7 +364 +{rms:.6g}$", text, re.MULTILINE)
    assert text.endswith("verified: every byte is as it was written\n")
    every = inspect(tmp_path, tensors=True)
    assert "root mean square" not in every
    assert re.search(r"^layer\.0\.norm1\.weight\.m +layer_000\.optimizer +fp32 +7 +28$", every, re.MULTILINE)


def test_a_summary_has_a_line_for_each_layer(tmp_path: Path) -> None:
    save_random(tmp_path, 1200, seed=4)
    lines = [line.split("  ") for line in inspect(tmp_path).splitlines()]
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    rows = rows[rows.index(["layer", "dtype", "parameters", "bytes of weights", "bytes of optimizer"]) + 1 :]
    assert [row for row in rows if row] == [
        ["embed", "fp32", "91", "364", "0"],
        ["layer_000", "fp32, bf16, fp16", "119", str(4 * 7 + 2 * 35 + 2 * 77), "28"],
    ]


def test_damage_is_told(tmp_path: Path) -> None:
    save_random(tmp_path, 1, seed=4)
    path = tmp_path / "checkpoints" / "step-000001" / "embed.weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    inspect(tmp_path)
    with pytest.raises(UserError, match=r"of embed.tokens, are not those that were written$"):
        inspect(tmp_path, verify=True)
