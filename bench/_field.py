"""What PyTorch reached elsewhere: the share of the peak that a comparison with it has to find again.

A peer that runs far below what it is known to reach was handicapped by something (a forced kernel, a busy core, a
wrong number of threads), and a comparison with it proves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

SOURCE = (
    "PyTorch 2.13 on two quiet cores of an AMD Zen 4 server, full step, FLOPs as 6 N + 12 L T d per token, "
    "over the FMA (fp32) or dot-product (bf16) peak measured beside it"
)
TOLERANCE = 0.07
"""Relative: a peer may lie so much below its share."""


class Case(NamedTuple):
    """Model, sequences, tokens per sequence and dtype."""

    model: str
    batch: int
    length: int
    dtype: str


SHARES: Mapping[Case, Mapping[str, float]] = MappingProxyType(
    {
        Case("gpt2-124m", 4, 256, "fp32"): {"torch_eager": 0.68, "torch_compile": 0.72, "torch_eager_malloc": 0.70},
        Case("gpt2-124m", 4, 256, "bf16"): {"torch_eager": 0.59, "torch_compile": 0.63, "torch_eager_malloc": 0.68},
        Case("gpt2-124m", 2, 1024, "fp32"): {"torch_eager": 0.66},
        Case("gpt2-124m", 2, 1024, "bf16"): {"torch_eager": 0.55, "torch_compile_malloc": 0.71},
        Case("gpt2-14m", 16, 256, "fp32"): {"torch_eager": 0.67, "torch_compile": 0.67},
        Case("gpt2-14m", 16, 256, "bf16"): {"torch_eager": 0.51, "torch_compile": 0.61},
    }
)


def _cause(products: float, known: float) -> str:
    """What the products alone say about a peer that fell short."""
    reached = f"its products alone reach {products:.1%} of the peak here"
    if products < known:
        return f"{reached}, so on this CPU its library of products holds its steps under that share"
    return f"{reached}, so what holds it back lies outside of them"


class Verdict(NamedTuple):
    """Whether a comparison counts."""

    valid: bool | None
    """None where nothing is known of such a case."""
    reason: str


def verdict(case: Case, shares: Mapping[str, float], products: Mapping[str, float]) -> Verdict:
    """Judge a run by what its peers reached.

    Args:
        case: what was run.
        shares: of the peak probed in the same minutes, by peer.
        products: the share that each peer's products reach alone. It changes no verdict, but tells a reader whether
            the peer's library of products is what holds it back on this CPU.
    """
    known = {peer: share for peer, share in SHARES.get(case, {}).items() if peer in shares}
    if not known:
        return Verdict(None, "nothing is known of what these peers reach in this case")
    for peer, share in known.items():
        if shares[peer] < (1 - TOLERANCE) * share:
            return Verdict(
                False,
                f"{peer} reached {shares[peer]:.1%} of the probed peak, more than {TOLERANCE:.0%} under the "
                f"{share:.0%} that it is known to reach ({SOURCE}); {_cause(products[peer], share)}",
            )
    return Verdict(True, "every known peer came within reach of its known share of the peak")
