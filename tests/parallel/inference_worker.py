"""Runs under mpiexec: what models write, and their logits, with every slice on a rank of its own.

    mpiexec -n 4 python -m tests.parallel.inference_worker FOLDER RESULTS.npz

FOLDER holds one run folder per model. For each of them and each number of slices rank 0 keeps the logits of a prompt,
a greedy and a sampled continuation; it stops where ranks differ.
"""

import sys
from pathlib import Path

import numpy as np

from pytrain.collectives import Group, Settings
from pytrain.generate import LoadedModel
from tests.parallel.launch import run_worker

CAPACITY, PROMPT, TOKENS = 170, 140, 12  # a prompt longer than the chunk in which it goes through the model
SLICES = (2, 3, 4)


def prompt_of(vocabulary: int) -> list[int]:
    """The same tokens everywhere."""
    return [int(token) for token in np.random.default_rng(11).integers(0, vocabulary, PROMPT)]


def describe(loaded: LoadedModel) -> dict[str, object]:
    """Logits (PROMPT, vocabulary) and tokens."""
    generator = loaded.generator(CAPACITY)
    prompt = prompt_of(loaded.model.vocabulary)
    logits = generator.logits(prompt)
    return {
        "logits": logits,
        "greedy": list(generator.continue_tokens(prompt, tokens=TOKENS, temperature=0)),
        "sampled": list(generator.continue_tokens(prompt, tokens=TOKENS, temperature=1.0, top_k=9, seed=3)),
        "weight_bytes": loaded.device.bytes_in_use("weights"),
    }


def main(world: Group) -> None:
    """All models with all numbers of slices, in turn."""
    results: dict[str, object] = {}
    for size in SLICES:
        inside = world.rank < size
        group = world.subgroup(f"tp {size}", list(range(size)) if inside else [world.rank])
        for folder in sorted(Path(sys.argv[1]).iterdir()):
            if inside:
                found = describe(LoadedModel(folder, group))
                ranks = group.gather(found)
                for rank in ranks:
                    assert rank["greedy"] == found["greedy"]
                    assert rank["sampled"] == found["sampled"]
                    assert np.array_equal(rank["logits"], found["logits"])
                held = [rank["weight_bytes"] for rank in ranks]
                results |= {f"{folder.name}/{size}/{key}": value for key, value in found.items()}
                results[f"{folder.name}/{size}/weight_bytes"] = held
            world.barrier()
    if world.rank == 0:
        np.savez(sys.argv[2], **results)


if __name__ == "__main__":
    run_worker(main, Settings(own=True, check="each"))
