"""The named models: their sizes against published formulas and against the list of their tensors."""

import dataclasses
import math
import random

import pytest

from pytrain.config import ModelConfig, model_preset, parameter_count
from pytrain.errors import UserError
from pytrain.presets import PRESETS
from tests.reference import Shape, parameter_shapes


def counted(model: ModelConfig) -> int:
    """Sum over the tensors that the reference lists."""
    names = [field.name for field in dataclasses.fields(Shape)]
    shape = Shape(**{name: getattr(model, name) for name in names})
    return sum(math.prod(tensor) for tensor in parameter_shapes(shape).values())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2-124m", 124_439_808),  # the released checkpoints
        ("gpt2-1.5b", 1_557_611_200),
        ("llama-7b", 6_738_415_616),
        ("llama-15m", 15_191_712),  # stories15M
        ("llama-110m", 109_529_856),  # stories110M
    ],
)
def test_published_counts(name: str, parameters: int) -> None:
    assert parameter_count(model_preset(name)) == parameters


@pytest.mark.parametrize("name", ["frontier-22b", "frontier-175b", "frontier-1t", "fugaku-13b", "gpt2-124m"])
def test_the_formula_of_the_frontier_paper(name: str) -> None:
    model = model_preset(name)
    layers, hidden = model.layers, model.hidden
    formula = 12 * layers * hidden**2 + 13 * layers * hidden
    formula += (model.vocabulary + model.context) * hidden + 2 * hidden
    assert parameter_count(model) == formula


@pytest.mark.parametrize(
    ("name", "billions"),
    [("frontier-22b", 22), ("frontier-175b", 175), ("frontier-1t", 1008), ("fugaku-13b", 13.2)],
)
def test_sizes_deserve_their_names(name: str, billions: float) -> None:
    assert parameter_count(model_preset(name)) / 1e9 == pytest.approx(billions, rel=5e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_the_sum_of_the_tensors(name: str) -> None:
    model = model_preset(name)
    assert parameter_count(model) == counted(model)


def test_counts_of_random_shapes() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(50):
        kv_heads = draw.randint(1, 4)
        model = ModelConfig(
            family=draw.choice(["gpt2", "llama"]),
            layers=draw.randint(1, 5),
            hidden=draw.randint(1, 99),
            heads=kv_heads * draw.randint(1, 4),
            kv_heads=kv_heads,
            head_size=2 * draw.randint(1, 50),
            ffn=draw.randint(1, 99),
            vocabulary=draw.randint(1, 999),
            context=draw.randint(1, 99),
            tied_head=draw.random() < 0.5,
        )
        assert parameter_count(model) == counted(model), model


def test_the_demo_has_a_million_parameters() -> None:
    assert parameter_count(model_preset("demo")) >= 1_000_000


def test_overrides_and_refusals() -> None:
    assert model_preset("gpt2-tiny", layers=3).layers == 3
    with pytest.raises(UserError, match=r'^no preset is called "gpt2-125m"; did you mean "gpt2-124m"\?$'):
        model_preset("gpt2-125m")
    with pytest.raises(UserError, match=r"^preset gpt2-tiny: model.hiden is not a key; did you mean model.hidden\?$"):
        model_preset("gpt2-tiny", hiden=3)
