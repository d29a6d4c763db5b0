from typing import Any

import numpy as np
from numpy.typing import NDArray

__test__: dict[str, str]

def fill_windows(
    stream: NDArray[Any],
    starts: NDArray[np.int64],
    windows: NDArray[np.int64],
    rows: NDArray[np.int64],
    vocabulary: int,
    boundaries: bool,
    mask_boundary: bool,
    tokens: NDArray[np.int32],
    targets: NDArray[np.int32],
    positions: NDArray[np.int32],
    document_starts: NDArray[np.int32],
) -> int: ...
