"""Predicted share of an A64FX core's peak of every product of the Fugaku project, in full: minutes under emulation.

python -m pytest tests/long/test_arm_counts.py --arm FOLDER        see tests/arm/README.md
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.arm.counts import Counter, share_of_peak
from tests.arm.machine import Machine
from tests.arm.shapes import WHOLE


def test_every_product_of_the_fugaku_project(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.config.getoption("arm")
    if folder is None:
        pytest.skip("no Arm machine to emulate: see tests/arm/README.md")
    counter = Counter(Machine(Path(folder).resolve()), tmp_path)
    counted = zip(WHOLE, counter.whole(WHOLE), strict=True)
    shares = {product: share_of_peak(counts, product) for product, counts in counted}
    for product, share in shares.items():
        print(f"{product.name:<28} {100 * share:.1f}%")
    assert [product.name for product, share in shares.items() if share < product.floor] == []
