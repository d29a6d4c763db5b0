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


def open_device(kind: str, what: str = 'run.device = "hip"') -> "Device":
    """The device that `run.device` names: "cpu", or "hip" for the first GPU that this process sees.

    Args:
        kind: of these two.
        what: asked for it, for the message.

    Raises:
        UserError: there is no GPU, or the native module was built without HIP.
    """
    module = native()
    if kind == "cpu":
        device: Device = module.CpuDevice()
        return device
    try:
        gpu: Device = module.hip_device(0)
    except module.Error as error:
        raise UserError(f"{what}: {error}") from None
    return gpu
