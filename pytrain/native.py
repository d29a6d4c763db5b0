"""The compiled module, or one sentence about why it is not there."""

from functools import cache
from typing import TYPE_CHECKING

from pytrain.errors import UserError

if TYPE_CHECKING:
    from types import ModuleType

    from pytrain._native import Device


@cache
def native() -> "ModuleType":
    """`pytrain._native`.

    Raises:
        UserError: it was not built, cannot be loaded, or PYTRAIN_ISA names what cannot run here.
    """
    try:
        from pytrain import _native
    except ImportError as error:
        raise UserError(
            f"the native module pytrain._native cannot be loaded ({error}); build it with `pip install .` "
            "in the source folder, in this Python environment"
        ) from error
    try:
        _native.information()
    except _native.Error as error:
        raise UserError(str(error)) from None
    return _native


def open_device(
    kind: str, fp16_sums: str = "fp32", what: str = 'run.device = "hip"', hip_products: str = "own"
) -> "Device":
    """The device that `run.device` names: "cpu", or "hip" for the first GPU that this process sees.

    Args:
        kind: of these two.
        fp16_sums: `precision.fp16_sums`, how the CPU sums products of fp16 matrices.
        what: asked for a GPU, for the message.
        hip_products: `run.hip_products`, who multiplies matrices on a GPU.

    Raises:
        UserError: there is no GPU, the native module was built without HIP or without the library that is to
            multiply, or this CPU has no chains of fp16 multiply-adds.
    """
    module = native()
    if kind == "cpu":
        try:
            device: Device = module.CpuDevice(fp16_chains=fp16_sums == "chains")
        except module.Error as error:
            raise UserError(f'precision.fp16_sums = "{fp16_sums}": {error}') from None
        return device
    try:
        gpu: Device = module.hip_device(0, rocblas=hip_products == "rocblas")
    except module.Error as error:
        raise UserError(f"{what}: {error}") from None
    return gpu
