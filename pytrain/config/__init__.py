"""Typed configuration: one TOML file, wholly validated before anything else starts.

Importing this package imports pydantic; `import pytrain` does not import this package.
"""

from pytrain.config.explain import commented_toml, explain
from pytrain.config.load import build, build_model, load, model_preset, resolved_toml
from pytrain.config.model import ModelConfig, RopeScaling, parameter_count
from pytrain.config.run import Corpus, HeldOutCorpus, RunConfig

__all__ = [
    "Corpus",
    "HeldOutCorpus",
    "ModelConfig",
    "RopeScaling",
    "RunConfig",
    "build",
    "build_model",
    "commented_toml",
    "explain",
    "load",
    "model_preset",
    "parameter_count",
    "resolved_toml",
]
