"""Named models with a training recipe each, as plain data: importing this does not import pydantic.

A preset says only what cannot be derived, so that an override (say `model.hidden`) also changes what follows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pytrain.errors import UserError
from pytrain.suggest import close_to

Value = str | int | float | bool
Table = Mapping[str, Value]


@dataclass(frozen=True)
class Preset:
    """A model, the recipe to train it (dotted key -> value), and where both come from."""

    model: Table
    recipe: Table
    source: str


def _gpt2(layers: int, hidden: int, heads: int, **more: Value) -> Table:
    shape: dict[str, Value] = {"family": "gpt2", "layers": layers, "hidden": hidden, "heads": heads}
    return MappingProxyType(shape | {"vocabulary": 50257, "context": 1024} | more)


def _llama(layers: int, hidden: int, heads: int, ffn: int, **more: Value) -> Table:
    shape: dict[str, Value] = {
        "family": "llama",
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "ffn": ffn,
    }
    return MappingProxyType(shape | {"vocabulary": 32000} | more)


def _recipe(
    steps: int,
    sequence_length: int,
    micro_batch: int,
    global_batch: int,
    peak: float,
    minimum: float,
    warmup: int,
) -> Table:
    return MappingProxyType(
        {
            "run.steps": steps,
            "data.sequence_length": sequence_length,
            "batch.micro_batch": micro_batch,
            "batch.global_batch": global_batch,
            "learning_rate.peak": peak,
            "learning_rate.minimum": minimum,
            "learning_rate.warmup_steps": warmup,
        }
    )


_FRONTIER = "Frontier (arXiv 2312.12705): shape, batch and learning rate as published; the number of steps is ours"
_TINY = "for tests"

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "gpt2-124m": Preset(
            _gpt2(12, 768, 12),
            _recipe(20000, 1024, 4, 512, 6e-4, 6e-5, 700),
            "GPT-2 small; recipe of about 10B tokens",
        ),
        "gpt2-1.5b": Preset(
            _gpt2(48, 1600, 25),
            _recipe(32000, 1024, 1, 1024, 2e-4, 2e-5, 700),
            "GPT-2 XL; recipe of about 33B tokens",
        ),
        "llama-15m": Preset(
            _llama(6, 288, 6, 768, context=256, tied_head=True),
            _recipe(20000, 256, 8, 128, 1e-3, 1e-4, 500),
            "the size of llama2.c's stories15M",
        ),
        "llama-110m": Preset(
            _llama(12, 768, 12, 2048, context=1024, tied_head=True),
            _recipe(20000, 1024, 4, 256, 5e-4, 5e-5, 1000),
            "the size of llama2.c's stories110M",
        ),
        "llama-7b": Preset(
            _llama(32, 4096, 32, 11008, context=2048, norm_eps=1e-6),
            _recipe(240000, 2048, 1, 2048, 3e-4, 3e-5, 2000),
            "LLaMA 7B: 1T tokens in steps of 4M",
        ),
        "fugaku-13b": Preset(
            _gpt2(40, 5184, 36, vocabulary=60000, context=2048, init_std=0.008),
            _recipe(96900, 2048, 1, 2016, 1e-4, 1e-6, 969),
            "Fugaku-LLM: 400B tokens, warm-up 4B; vocabulary = 10K code + 20K English + 30K Japanese pieces",
        ),
        "frontier-22b": Preset(
            _gpt2(48, 6144, 48, context=2048), _recipe(10000, 2048, 1, 640, 6e-5, 6e-6, 100), _FRONTIER
        ),
        "frontier-175b": Preset(
            _gpt2(96, 12288, 96, context=2048), _recipe(10000, 2048, 1, 1280, 6e-5, 6e-6, 100), _FRONTIER
        ),
        "frontier-1t": Preset(
            _gpt2(128, 25600, 128, context=2048), _recipe(10000, 2048, 1, 1024, 6e-5, 6e-6, 100), _FRONTIER
        ),
        "gpt2-tiny": Preset(
            _gpt2(2, 64, 4, vocabulary=256, context=64), _recipe(100, 64, 2, 4, 1e-3, 1e-4, 10), _TINY
        ),
        "llama-tiny": Preset(
            _llama(2, 64, 4, 160, kv_heads=2, vocabulary=256, context=64),
            _recipe(100, 64, 2, 4, 1e-3, 1e-4, 10),
            _TINY,
        ),
        "demo": Preset(
            _llama(4, 192, 6, 512, vocabulary=2048, context=256, tied_head=True),
            _recipe(700, 256, 8, 8, 4e-3, 4e-4, 40),
            "what `pytrain demo` trains within about two minutes on two cores",
        ),
    }
)


def find_preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        UserError: there is none; the sentence lists all.
    """
    if name not in PRESETS:
        raise UserError(
            f'no preset is called "{name}"{close_to(name, PRESETS) or "; there are " + ", ".join(PRESETS)}'
        )
    return PRESETS[name]
