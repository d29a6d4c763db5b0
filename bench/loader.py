"""How fast batches come from disk: tokens per second in order, after a jump, from a mixture, and what a step pays.

    python -m bench.loader

The corpora are random tokens in documents of some hundreds, in the page cache after the first pass, as they are in a
run whose machine has memory to spare. A jump is a batch from anywhere: the loader has no state but an integer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import click
import numpy as np

from pytrain.data.indexed import IndexedWriter
from pytrain.data.loader import CorpusSpec, Loader
from pytrain.progress import compact

from . import _record

VOCABULARY, SEED = 50257, 1
DOCUMENT = 400
"""Mean tokens of a document."""
CORPORA = 3
Work = Callable[[], object]


def write_corpora(folder: Path, tokens: int) -> list[CorpusSpec]:
    """Corpora of `tokens` tokens together, of which each has a different share of the mixture."""
    random = np.random.default_rng(SEED)
    specs = []
    for number in range(CORPORA):
        prefix = folder / f"corpus-{number}"
        with IndexedWriter(prefix, VOCABULARY) as writer:
            left = tokens // CORPORA
            while left > 0:
                length = min(left, int(random.integers(1, 2 * DOCUMENT)))
                writer.add_document(random.integers(0, VOCABULARY, length))
                left -= length
            writer.close()
        specs.append(CorpusSpec(prefix, weight=float(number + 1)))
    return specs


def calls(specs: list[CorpusSpec], batch: int, length: int) -> Iterator[tuple[str, Work]]:
    """(name, call that makes one batch)."""
    kinds = {
        "one corpus": (specs[:1], False),
        "one corpus, documents apart": (specs[:1], True),
        "mixture, documents apart": (specs, True),
    }
    for name, (chosen, boundaries) in kinds.items():
        loader = Loader(chosen, length, VOCABULARY, SEED, boundaries)
        yield name, partial(_next_batch, loader, count(0, batch), batch)
    jumps = np.random.default_rng(SEED)
    yield "mixture, after a jump", lambda: loader.batch(int(jumps.integers(0, 10**9)), batch)


def _next_batch(loader: Loader, places: Iterator[int], batch: int) -> None:
    loader.batch(next(places), batch)


@click.command()
@click.option("--batch", default=4, show_default=True, type=click.IntRange(min=1), help="Sequences at a time.")
@click.option("--seq", default=256, show_default=True, type=click.IntRange(min=1), help="Tokens of each.")
@click.option("--tokens", default=3_000_000, show_default=True, type=click.IntRange(min=1000), help="In all corpora.")
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=1), help="Of taking turns.")
@_record.json_option
def command(**options: Any) -> None:
    """Time the loader."""
    batch, length = options["batch"], options["seq"]
    with tempfile.TemporaryDirectory() as name:
        specs = write_corpora(Path(name), options["tokens"])
        times = _record.alternate(dict(calls(specs, batch, length)), options["rounds"])
    results = []
    print(f"batches of {batch} x {length} tokens from {options['tokens']:,}")
    for kind, seconds in times.items():
        rate = _record.summary([batch * length / value for value in seconds])
        found: dict[str, Any] = {"what": kind, "tokens_per_s": rate, "batch_seconds": _record.summary(seconds)}
        results.append(found)
        microseconds = _record.spread(found["batch_seconds"], 1e-6)
        print(f"{kind:<28} {compact(rate['median']):>7} tokens/s  {microseconds:>26} us a batch", flush=True)
    _record.write(options["json_path"], "loader", options, {"cases": results})


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench loader` does."""
    command.main(arguments, prog_name="pytrain bench loader", standalone_mode=False)


if __name__ == "__main__":
    _record.start(command, "python -m bench.loader")
