"""The compiled module, or one sentence about why it is not there."""

from functools import cache
from typing import TYPE_CHECKING

from pytrain.errors import UserError

if TYPE_CHECKING:
    from types import ModuleType


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
