"""Models exported by `pytrain export`: transformers computes the same, and import brings them back."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pytrain.checkpoint import Checkpoint
from pytrain.cli import run
from pytrain.errors import ExitCode
from pytrain.generate import LoadedModel
from tests import reference, runs, spine

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"nothing to compare with: {' and '.join(MISSING)} not installed"),
    # transformers and torch warn about their own internals
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

LENGTH, PROMPT, CONTINUATION = 512, 37, 32
GPT2 = reference.Shape("gpt2", 3, 64, 4, 4, 16, 176, 211, LENGTH, tied_head=True)
LLAMA = reference.Shape(
    "llama", 3, 64, 8, 2, 12, 150, 211, LENGTH, tied_head=False, norm_eps=1e-6, rope_theta=500_000.0
)
SHAPES = {"gpt2": GPT2, "llama": LLAMA}


def weights_of(name: str) -> dict[str, NDArray[np.float64]]:
    seed = 29
    print(f"seed {seed}")
    weights = reference.visible_parameters(SHAPES[name], seed)
    for layer in range(SHAPES[name].layers):
        # transformers computes rotary angles in fp32 (an error of 3e-5 at position 512), which the sharpest
        # attention would carry into the logits.
        weights[f"layer.{layer}.attention.q.weight"] *= 0.5
    return weights


def exported(name: str, folder: Path) -> tuple[Path, Path]:
    """The run folder of a random model, and its export."""
    run_folder = runs.save_model(folder / "run", spine.model_config(SHAPES[name]), weights_of(name))
    assert run(["export", str(run_folder), "--hf", str(folder / "hf")]) == ExitCode.OK
    return run_folder, folder / "hf"


def theirs(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def random_tokens(name: str) -> list[int]:
    random = np.random.default_rng(22)
    return [int(token) for token in random.integers(0, SHAPES[name].vocabulary, LENGTH)]


@pytest.mark.parametrize("name", SHAPES)
def test_logits(tmp_path: Path, name: str) -> None:
    import torch

    run_folder, folder = exported(name, tmp_path)
    tokens = random_tokens(name)
    ours = LoadedModel(run_folder).generator(LENGTH).logits(tokens)
    with torch.no_grad():
        expected = theirs(folder)(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    assert ours.shape == expected.shape == (LENGTH, SHAPES[name].vocabulary)
    assert expected.std() >= 1.0
    difference = float(np.abs(ours - expected).max())
    print(f"{name}: standard deviation {expected.std():.3g}, largest difference {difference:.3g}")
    assert difference < 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_continuation(tmp_path: Path, name: str) -> None:
    import torch

    run_folder, folder = exported(name, tmp_path)
    prompt = random_tokens(name)[:PROMPT]
    generator = LoadedModel(run_folder).generator(LENGTH)
    ours = list(generator.continue_tokens(prompt, tokens=CONTINUATION, temperature=0))
    model = theirs(folder)
    with torch.no_grad():
        found = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, PROMPT, dtype=torch.long),
            max_new_tokens=CONTINUATION,
            min_new_tokens=CONTINUATION,
            do_sample=False,
            pad_token_id=0,
        )
    assert ours == found[0, PROMPT:].tolist()
    assert len(set(ours)) > 8, "a continuation of one token would prove little"


@pytest.mark.parametrize("name", SHAPES)
def test_import_brings_the_same_bytes_back(tmp_path: Path, name: str) -> None:
    run_folder, folder = exported(name, tmp_path)
    assert run(["import", "--hf", str(folder), "--out", str(tmp_path / "back")]) == ExitCode.OK
    before, after = Checkpoint.open(run_folder), Checkpoint.open(tmp_path / "back")
    assert after.tensors() == before.tensors()
    for tensor in before.tensors():
        assert after.read(tensor).tobytes() == before.read(tensor).tobytes(), tensor
    tokens = random_tokens(name)[:50]
    np.testing.assert_array_equal(
        LoadedModel(tmp_path / "back").generator(50).logits(tokens),
        LoadedModel(run_folder).generator(50).logits(tokens),
    )
