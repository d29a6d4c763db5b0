"""Trains GPT-2 and LLaMA models on CPU clusters without a framework.

    import pytrain
    config = pytrain.load_config("run.toml")
    with pytrain.Trainer(config) as trainer:
        trainer.run()
    print("".join(pytrain.generate_text(config.run.folder, "Once upon a time")))

Importing this package imports nothing heavy: ten thousand ranks do it at once.
"""

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, Any

# In a checkout this folder hides the installed package, and with it the compiled modules that only an
# installation has: look for what is not here in the other `pytrain` folders of the path.
__path__ = pkgutil.extend_path(__path__, __name__)

if TYPE_CHECKING:
    from pytrain.config import ModelConfig, RunConfig
    from pytrain.config import load as load_config
    from pytrain.data.loader import HeldOut, Loader
    from pytrain.data.tokenizer import load_tokenizer
    from pytrain.errors import UserError
    from pytrain.generate import generate_text
    from pytrain.stage import Stage
    from pytrain.train import Trainer

__all__ = [
    "HeldOut",
    "Loader",
    "ModelConfig",
    "RunConfig",
    "Stage",
    "Trainer",
    "UserError",
    "generate_text",
    "load_config",
    "load_tokenizer",
]

_HOMES = {
    "HeldOut": ("pytrain.data.loader", "HeldOut"),
    "Loader": ("pytrain.data.loader", "Loader"),
    "ModelConfig": ("pytrain.config", "ModelConfig"),
    "RunConfig": ("pytrain.config", "RunConfig"),
    "Stage": ("pytrain.stage", "Stage"),
    "Trainer": ("pytrain.train", "Trainer"),
    "UserError": ("pytrain.errors", "UserError"),
    "generate_text": ("pytrain.generate", "generate_text"),
    "load_config": ("pytrain.config", "load"),
    "load_tokenizer": ("pytrain.data.tokenizer", "load_tokenizer"),
}


def __getattr__(name: str) -> Any:
    """Import the home of a public name when it is first asked for."""
    if name == "__version__":
        from pytrain.information import version

        return version()
    if name not in _HOMES:
        raise AttributeError(f"module 'pytrain' has no attribute '{name}'")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
