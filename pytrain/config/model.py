"""The shape of a model."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from pytrain.config.checks import MODEL_CHECKS, ROPE_THETA, Check, find_problems

Family = Literal["gpt2", "llama"]


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no silent conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def flat_values(name: str, section: Section) -> dict[str, Any]:
    """The keys of a valid section as dotted key -> value."""
    return {f"{name}.{key}": getattr(section, key) for key in type(section).model_fields}


def require(checks: tuple[Check, ...], values: Mapping[str, object]) -> None:
    """Raise one pydantic error that carries every problem found."""
    problems = find_problems(checks, values)
    if problems:
        sentences = "; ".join(problem.sentence for problem in problems)
        raise PydanticCustomError("checks", "{sentences}", {"sentences": sentences})


def _default_head_size(data: dict[str, Any]) -> int:
    # 0 marks "not divisible": the check on hidden and heads turns it into a sentence.
    hidden, heads = data["hidden"], data["heads"]
    return hidden // heads if hidden % heads == 0 else 0


def _default_ffn(data: dict[str, Any]) -> int:
    # 0 marks "has to be given": the check on ffn turns it into a sentence.
    return 4 * data["hidden"] if data["family"] == "gpt2" else 0


class RopeScaling(Section):
    """Stretches rotary positions beyond the context of an earlier training, as Llama 3 does."""

    rope_type: Literal["llama3"] = Field(default="llama3", description="The formula; only Llama 3's is known.")
    factor: float = Field(gt=0, description="Low frequencies are divided by this.")
    low_freq_factor: float = Field(gt=0, description="Wavelengths above original / this are scaled by factor.")
    high_freq_factor: float = Field(gt=0, description="Wavelengths below original / this stay as they are.")
    original_max_position_embeddings: int = Field(gt=0, description="Context of the earlier training, in tokens.")


class ModelConfig(Section):
    """The shape of the model and how its weights start."""

    family: Family = Field(
        description="gpt2: LayerNorm, biases, learned positions, GELU. "
        "llama: RMSNorm, no biases, rotary positions, SwiGLU."
    )
    layers: int = Field(gt=0, description="Number of transformer layers.")
    hidden: int = Field(gt=0, description="Width of the residual stream, in channels.")
    heads: int = Field(gt=0, description="Query heads per layer.")
    kv_heads: int = Field(
        default_factory=lambda data: data["heads"],
        gt=0,
        description="Key and value heads per layer; fewer than heads is grouped-query attention.",
        json_schema_extra={"default_text": "heads"},
    )
    head_size: int = Field(
        default_factory=_default_head_size,
        gt=0,
        description="Channels per head.",
        json_schema_extra={"default_text": "hidden / heads"},
    )
    ffn: int = Field(
        default_factory=_default_ffn,
        gt=0,
        description="Width inside the feed-forward layer, in channels.",
        json_schema_extra={"default_text": "4 * hidden for gpt2; llama has to say it"},
    )
    vocabulary: int = Field(gt=0, lt=2**31, description="Number of tokens; at least as many as the tokenizer has.")
    context: int = Field(gt=0, description="Longest sequence the model is made for, in tokens.")
    tied_head: bool = Field(
        default_factory=lambda data: data["family"] == "gpt2",
        description="Use the token embedding as the output layer's weight.",
        json_schema_extra={"default_text": "true for gpt2, false for llama"},
    )
    norm_eps: float = Field(default=1e-5, gt=0, description="Added to the variance in every norm.")
    rope_theta: float = Field(default=ROPE_THETA, gt=0, description="Base of the rotary wavelengths (llama).")
    rope_scaling: RopeScaling | None = Field(
        default=None, description="Llama 3's stretching of rotary positions (llama)."
    )
    init_std: float = Field(
        default=0.02,
        gt=0,
        description="Standard deviation of the initial weights; "
        "attention.out and mlp.down start with init_std / sqrt(2 * layers).",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        require(MODEL_CHECKS, flat_values("model", self))
        return self


def parameter_count(model: ModelConfig) -> int:
    """Exact number of trainable parameters of a model (a tied head counts once)."""
    biased = model.family == "gpt2"
    query, key = model.heads * model.head_size, model.kv_heads * model.head_size
    norm = model.hidden * (2 if biased else 1)
    attention = model.hidden * (query + 2 * key + query)
    mlp = model.hidden * model.ffn * (2 if biased else 3)
    biases = query + 2 * key + model.hidden + model.ffn + model.hidden if biased else 0
    embedding = model.vocabulary * model.hidden + (model.context * model.hidden if biased else 0)
    head = norm + (0 if model.tied_head else model.vocabulary * model.hidden)
    return embedding + model.layers * (2 * norm + attention + mlp + biases) + head
