import numpy as np
from numpy.typing import NDArray

__test__: dict[str, str]
MIXTURE_BLOCK: int
MAXIMUM_SIZE: int

def philox_block(counter: tuple[int, int, int, int], key0: int, key1: int) -> NDArray[np.uint64]: ...
def permute(first: int, count: int, size: int, seed: int, stream: int, epoch: int) -> NDArray[np.int64]: ...
def ordinals_to_samples(
    ordinals: NDArray[np.int64], size: int, seed: int, stream: int
) -> NDArray[np.int64]: ...
def interleave(
    first: int, count: int, cumulative: NDArray[np.uint64], seed: int, phase: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...
def interleaved_counts(
    samples: int, cumulative: NDArray[np.uint64], seed: int, phase: int
) -> NDArray[np.int64]: ...
