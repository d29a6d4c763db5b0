"""bf16 and fp16 train like fp32: late losses of the same run agree. Every instruction set: tests/long."""

from pathlib import Path

from tests import runs
from tests.dtype_cases import TOLERANCE, late_mean, losses


def test_late_losses_of_all_number_formats_agree(tmp_path: Path) -> None:
    corpora = runs.make_corpora(tmp_path / "data")
    means = {}
    for dtype in ("fp32", "bf16", "fp16"):
        (tmp_path / dtype).mkdir()
        means[dtype] = late_mean(losses(corpora, tmp_path / dtype, "gpt2", dtype))
        print(f"{dtype}: {means[dtype]:.5f}, {means[dtype] / means['fp32'] - 1:+.5f}")
    for dtype in ("bf16", "fp16"):
        assert abs(means[dtype] / means["fp32"] - 1) <= TOLERANCE
