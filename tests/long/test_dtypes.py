"""The late losses of bf16 and fp16 agree with fp32's on every instruction set, for both families."""

from pathlib import Path

import pytest

from pytrain._native import kernels
from tests import runs
from tests.dtype_cases import TOLERANCE, late_mean, losses


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> runs.Corpora:
    return runs.make_corpora(tmp_path_factory.mktemp("corpora") / "data")


@pytest.mark.parametrize("isa", kernels.tables())
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_late_losses_agree(corpora: runs.Corpora, tmp_path: Path, family: str, isa: str) -> None:
    means = {}
    for dtype in ("fp32", "bf16", "fp16"):
        (tmp_path / dtype).mkdir()
        means[dtype] = late_mean(losses(corpora, tmp_path / dtype, family, dtype, PYTRAIN_ISA=isa))
        print(f"{family} {isa} {dtype}: {means[dtype]:.5f}, {means[dtype] / means['fp32'] - 1:+.5f}")
    for dtype in ("bf16", "fp16"):
        assert abs(means[dtype] / means["fp32"] - 1) <= TOLERANCE
