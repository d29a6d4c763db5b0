"""`precision.fp16_sums`: which configurations and machines may ask for chains of fp16 multiply-adds."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytrain._native import kernels
from pytrain.config import load
from pytrain.errors import UserError
from pytrain.native import open_device
from tests.runs import configuration, make_corpora, write_toml


@pytest.mark.parametrize(("dtype", "device"), [("fp32", "cpu"), ("bf16", "cpu"), ("fp16", "hip")])
def test_chains_want_fp16_on_a_cpu(tmp_path: Path, dtype: str, device: str) -> None:
    config = configuration(make_corpora(tmp_path / "corpora"), tmp_path / "run", "gpt2", precision__dtype="fp16")
    toml = write_toml(config, tmp_path / "run.toml")
    settings = ['precision.fp16_sums="chains"', f'precision.dtype="{dtype}"', f'run.device="{device}"']
    with pytest.raises(UserError, match=r'precision.fp16_sums "chains" is for fp16 matrices on a CPU'):
        load(toml, [*settings, "precision.loss_scale=1"])
    assert load(toml, settings[:1]).precision.fp16_sums == "chains"


def test_a_machine_without_chains_refuses_them() -> None:
    if kernels.chosen().startswith("sve"):
        assert open_device("cpu", "chains").name == "cpu"
        return
    with pytest.raises(
        UserError, match=r'precision.fp16_sums = "chains": .* need an Arm CPU with SVE; the \w+ kernels'
    ):
        open_device("cpu", "chains")
    assert open_device("cpu").name == "cpu"
