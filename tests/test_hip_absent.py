"""Where there is no GPU, or a build without HIP: one sentence and exit status 2, never a crash."""

from pathlib import Path

import pytest

from pytrain import _native
from pytrain.errors import UserError
from pytrain.native import open_device
from tests import runs

REASON = (
    r'run.device = "hip": '
    r"(GPU 0 cannot be used: this build has no HIP|no (AMD|NVIDIA) GPU is visible to this process)"
)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UserError, match=REASON):
        open_device("hip")
    assert open_device("cpu").name == "cpu"


def test_products_by_a_library_that_is_not_there() -> None:
    """Said before anybody looks for a GPU."""
    with pytest.raises(UserError, match=r'"rocblas": (GPU 0 cannot be used: )?this build has no (HIP|rocBLAS)'):
        open_device("hip", what='run.hip_products = "rocblas"', hip_products="rocblas")


def test_buffers_of_the_cpu_are_not_offered_to_a_gpu_aware_mpi() -> None:
    buffer = _native.Buffer(_native.CpuDevice(), 3, "fp32", "weights")
    assert not hasattr(buffer, "__cuda_array_interface__")


def test_training_says_so(tmp_path: Path) -> None:
    config = runs.configuration(runs.make_corpora(tmp_path / "corpora"), tmp_path / "run", run__device="hip")
    done = runs.run_command("train", runs.write_toml(config, tmp_path / "run.toml"))
    assert done.returncode == 2, done.stderr
    assert 'run.device = "hip": ' in done.stderr
    assert "Traceback" not in done.stderr
