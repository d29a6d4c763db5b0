"""Philox and the normal numbers made from it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pytrain._native import kernels

# Known answers published with the algorithm (Random123, philox4x32-10): counter, key, result.
KNOWN = [
    ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, 0xFFFFFFFFFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: list[int], key: int, expected: list[int]) -> None:
    assert kernels.philox(counter, key) == expected


def test_normals_are_box_muller_of_the_words() -> None:
    seed, key = 0x123456789ABCDEF0, 0xFEDCBA9876543210
    for block in (0, 1, 77, 2**32 - 1, 2**32, 2**40 + 3):
        counter = [block & 0xFFFFFFFF, block >> 32, key & 0xFFFFFFFF, key >> 32]
        words = [(word + 0.5) / 2**32 for word in kernels.philox(counter, seed)]
        expected = []
        for u, v in (words[:2], words[2:]):
            radius = math.sqrt(-2 * math.log(u))
            expected += [radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)]
        np.testing.assert_allclose(kernels.philox_normals(seed, key, block), expected, rtol=0, atol=1e-14)


def test_normals_have_the_moments_of_a_normal_distribution() -> None:
    sample = np.array([kernels.philox_normals(3, 4, block) for block in range(25_000)]).ravel()
    assert abs(sample.mean()) < 4 / math.sqrt(sample.size)
    assert abs(sample.var() - 1) < 4 * math.sqrt(2 / sample.size)
    assert abs((sample**4).mean() - 3) < 4 * math.sqrt(96 / sample.size)
    # Neighbouring numbers are independent.
    assert abs((sample[1:] * sample[:-1]).mean()) < 4 / math.sqrt(sample.size)
