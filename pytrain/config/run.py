"""Everything a run needs, one class per section of the TOML file.

Each field carries its own description: `pytrain config KEY` and the comments of `pytrain init` show them.
"""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pytrain.config.checks import RUN_CHECKS
from pytrain.config.model import ModelConfig, Section, flat_values, require

Dtype = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["cosine", "linear", "wsd", "constant"]
RecomputePolicy = Literal["none", "selective", "full"]

FP16_LOSS_SCALE = 65536.0


class RunSection(Section):
    """What the run is called, how long it is, and where it lives."""

    folder: str = Field(
        min_length=1,
        description="Folder of this run: metrics, checkpoints, the resolved configuration. "
        "Relative paths start at the working directory, here and everywhere.",
    )
    steps: int = Field(gt=0, description="Number of optimizer steps of the whole run.")
    seed: int = Field(default=1234, ge=0, lt=2**63, description="Seed of the initial weights and of the data order.")
    device: Literal["cpu", "hip"] = Field(
        default="cpu",
        description="Where to compute: cpu, or hip for the first AMD GPU that each rank sees "
        "(in a build with PYTRAIN_HIP=ON).",
    )
    hip_products: Literal["own", "rocblas"] = Field(
        default="own",
        description="Who multiplies matrices on a GPU: own kernels, or rocblas (in a build with PYTRAIN_ROCBLAS=ON), "
        "whose order of addition is its own affair.",
    )
    deterministic: Literal[True] = Field(
        default=True,
        description="The same run twice gives the same bits. There is no other mode; the key records it.",
    )
    log_every: int = Field(
        default=1,
        gt=0,
        description="Print a line every so many steps where the output is not a terminal, its loss, times and rates "
        "being means over them; metrics.jsonl always has every step.",
    )
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        description="Peak of this machine in TFLOP/s, for MFU; `pytrain bench peak` measures it.",
    )


class TokenizerSection(Section):
    """The tokenizer that made the corpora."""

    path: str = Field(min_length=1, description="A SentencePiece .model file or a Hugging Face tokenizer.json.")


def _last_part(prefix: object) -> str:
    return str(prefix).rstrip("/").rsplit("/", 1)[-1]


class Corpus(Section):
    """One prepared corpus to train on."""

    prefix: str = Field(
        min_length=1, description="PREFIX of the PREFIX.bin and PREFIX.idx that `pytrain prepare` wrote."
    )
    weight: float = Field(
        default=1.0, gt=0, description="Share of the tokens, relative to the other corpora's weights."
    )
    name: str = Field(
        default_factory=lambda data: _last_part(data["prefix"]),
        min_length=1,
        description="Name in messages and metrics.",
        json_schema_extra={"default_text": "last part of prefix"},
    )


class HeldOutCorpus(Section):
    """One prepared corpus to evaluate on; the training never sees it."""

    prefix: str = Field(
        min_length=1, description="PREFIX of the PREFIX.bin and PREFIX.idx that `pytrain prepare` wrote."
    )
    name: str = Field(
        default_factory=lambda data: _last_part(data["prefix"]),
        min_length=1,
        description="Name in messages and metrics.",
        json_schema_extra={"default_text": "last part of prefix"},
    )


def _tables(value: Any) -> Any:
    """Accept "PREFIX" for [{prefix = "PREFIX"}], alone or in a list."""
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, tuple):
        return tuple({"prefix": entry} if isinstance(entry, str) else entry for entry in value)
    return value


class DataSection(Section):
    """What to train and evaluate on."""

    train: tuple[Corpus, ...] = Field(
        min_length=1,
        description="Corpora to train on, one [[data.train]] table each, mixed by weight; "
        "a bare PREFIX stands for one of weight 1.",
    )
    heldout: tuple[HeldOutCorpus, ...] = Field(
        default=(),
        description="Corpora to evaluate on, one [[data.heldout]] table each; a bare PREFIX will do.",
    )
    sequence_length: int = Field(gt=0, description="Tokens per training sequence; at most model.context.")
    document_boundaries: bool = Field(
        default=True,
        description="Attention and positions start anew at each document: documents do not see each other.",
    )

    @field_validator("train", "heldout", mode="before")
    @classmethod
    def _accept_prefixes(cls, value: Any) -> Any:
        return _tables(value)

    @field_validator("train", "heldout")
    @classmethod
    def _distinct_names(cls, value: tuple[Corpus | HeldOutCorpus, ...]) -> tuple[Corpus | HeldOutCorpus, ...]:
        names = [corpus.name for corpus in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'has two corpora named "{name}"; give one of them another name')
        return value


class BatchSection(Section):
    """How many sequences make a step."""

    micro_batch: int = Field(
        gt=0, description="Sequences that go through the model at once; sets the memory it takes."
    )
    global_batch: int = Field(
        gt=0,
        description="Sequences per optimizer step, a multiple of micro_batch; gradients are accumulated.",
    )


class OptimizerSection(Section):
    """AdamW with decoupled weight decay on matrices and embeddings, and clipping by the global norm."""

    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the mean of the gradient.")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="Decay of the mean of the squared gradient.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of the mean square.")
    weight_decay: float = Field(default=0.1, ge=0, description="Decay per step, times the learning rate.")
    clip: float = Field(default=1.0, ge=0, description="Largest global norm of the gradient; 0 does not clip.")


class LearningRateSection(Section):
    """The learning rate of each step."""

    peak: float = Field(gt=0, description="Learning rate after warm-up.")
    minimum: float = Field(
        default_factory=lambda data: data["peak"] / 10,
        ge=0,
        description="Learning rate at the last step (not for constant).",
        json_schema_extra={"default_text": "peak / 10"},
    )
    schedule: Schedule = Field(
        default="cosine",
        description="From peak to minimum: cosine or linear over all steps after warm-up; wsd stays at peak "
        "and falls linearly over the last decay_steps; constant stays at peak.",
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Steps over which the learning rate rises linearly to peak."
    )
    decay_steps: int = Field(default=0, ge=0, description="Length of the final fall of wsd, in steps.")


class PrecisionSection(Section):
    """In which number format things are stored; arithmetic and sums are fp32, unless fp16_sums says otherwise."""

    dtype: Dtype = Field(default="fp32", description="Format of weights and activations.")
    gradients: Dtype = Field(default="fp32", description="Format of accumulated gradients (advanced).")
    gradient_reduction: Dtype = Field(
        default="fp32", description="Format in which gradients travel between ranks (advanced)."
    )
    fp16_sums: Literal["fp32", "chains"] = Field(
        default="fp32",
        description="How products of fp16 matrices are summed: fp32, which widens them; or chains, on Arm CPUs with "
        "SVE (A64FX): fp16 multiply-adds at twice the rate, at most 64 in a row, then added to fp32, and less exact "
        "(advanced).",
    )
    master: Dtype = Field(default="fp32", description="Format of the optimizer's own copy of the weights (advanced).")
    loss_scale: float = Field(
        default_factory=lambda data: FP16_LOSS_SCALE if data["dtype"] == "fp16" else 1.0,
        gt=0,
        description="First loss scale of fp16; 1 for the other formats.",
        json_schema_extra={"default_text": f"{FP16_LOSS_SCALE:g} for fp16, 1 otherwise"},
    )


class RecomputeSection(Section):
    """Trade arithmetic for memory: what is computed again in the backward pass instead of kept."""

    policy: tuple[RecomputePolicy, ...] = Field(
        default=("none",),
        min_length=1,
        description="none keeps what would take a product to compute again; selective computes attention anew too; "
        "full keeps only each layer's input. A list gives each pipeline stage its own.",
    )

    @field_validator("policy", mode="before")
    @classmethod
    def _accept_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def of_stage(self, stage: int) -> RecomputePolicy:
        """Policy of pipeline stage `stage` (counted from 0)."""
        return self.policy[stage] if len(self.policy) > 1 else self.policy[0]


class ParallelSection(Section):
    """How the work is split over processes."""

    dp: int = Field(default=1, gt=0, description="Data-parallel replicas.")
    pp: int = Field(default=1, gt=0, description="Pipeline stages.")
    tp: int = Field(default=1, gt=0, description="Tensor-parallel ranks.")
    zero: int = Field(
        default=0,
        ge=0,
        le=3,
        description="ZeRO: 1 shards optimizer state over dp, 2 also gradients, 3 also weights.",
    )
    bucket_mb: float = Field(
        default=256.0,
        gt=0,
        description="Gradients are summed over dp, and ZeRO's weights gathered, in buckets of at most so many 10^6 "
        "bytes of gradients: a layer, or as few parts of it as fit, so that sums begin before its backward ends. "
        "Bounds what they pass through on the way: pinned host memory of a GPU, or another gradient_reduction.",
    )
    sequence_parallel: bool = Field(
        default=False,
        description="Split the residual stream and the norms over the tensor-parallel ranks, by tokens: their "
        "activations take a tp-th of the memory, for a quarter more traffic. With tp = 1 there is nothing to split.",
    )
    schedule: Literal["1f1b", "gpipe", "interleaved", "zero-bubble"] = Field(
        default="1f1b",
        description="Order of forward and backward passes in the pipeline; `pytrain plan` draws them.",
    )
    rank_order: Literal["dp-pp-tp", "dp-tp-pp", "pp-dp-tp", "pp-tp-dp", "tp-dp-pp", "tp-pp-dp"] = Field(
        default="dp-pp-tp",
        description="Axes of the grid from the slowest to the fastest in the launcher's numbering of ranks: "
        "the last one's neighbours are closest.",
    )
    rank_map: str | None = Field(
        default=None,
        description="File that says instead, line by line, which coordinates `dp pp tp` each rank takes.",
    )
    chunks: int = Field(
        default=1, gt=0, description="Stages that each pipeline rank holds, for schedule = interleaved."
    )
    stage_layers: tuple[int, ...] = Field(
        default=(),
        description="Layers of each stage in the order of the pipeline. Empty: as even as can be, with the head "
        "counted as the layers that take as many FLOPs.",
    )


class CollectivesSection(Section):
    """How ranks exchange data. Read when the run starts; `pytrain info --collectives` measures algorithms."""

    own: bool = Field(
        default=False, description="Only our own algorithms over point-to-point messages, none of MPI's."
    )
    table: str | None = Field(
        default=None,
        min_length=1,
        description="File that `pytrain info --collectives` wrote: which algorithm serves which size. It is kept "
        "with each checkpoint. Without one, fixed rules choose.",
    )
    check: Literal["step", "each"] = Field(
        default="step",
        description="When ranks compare what they are doing: once a step, or before every operation (slow).",
    )
    progress: Literal["auto", "thread", "test"] = Field(
        default="auto",
        description="What moves messages on while kernels run: a thread, or test calls between operations. "
        "auto takes the thread where the affinity mask has a core that no rank of the node computes on.",
    )
    overlap: bool = Field(
        default=True,
        description="Sum and gather beside computation; false waits for every sum at once, to measure what "
        "overlap is worth. Results do not change.",
    )
    device_buffers: Literal["staged", "direct"] = Field(
        default="staged",
        description="How arrays in a GPU's memory reach MPI: through pinned host memory, which any MPI takes, or, "
        "where MPI says that it knows AMD GPUs, direct.",
    )
    watchdog_seconds: float = Field(
        default=600.0,
        ge=0,
        description="End the job with a report of every rank when nothing has moved for so long; 0 never does.",
    )


class CheckpointSection(Section):
    """When to save, and what to keep."""

    every: int = Field(
        default=0, ge=0, description="Save every so many steps; 0 saves only at the end and when stopped."
    )
    asynchronous: bool = Field(
        default=True,
        description="Write a copy of what is saved while training goes on. The last save of a run, and the one after "
        "a signal, are waited for.",
    )
    snapshot_gb: float = Field(
        default=1.0,
        gt=0,
        description="Memory for that copy on each rank, in 10^9 bytes, taken when the run starts (less where the "
        "rank saves less). What has no room in it is written before training goes on.",
    )
    keep_last: int = Field(default=0, ge=0, description="Keep this many of the newest checkpoints; 0 keeps all.")
    keep_every: int = Field(
        default=0, ge=0, description="Besides keep_last, keep those whose step is a multiple; 0 for none."
    )


class EvaluationSection(Section):
    """Loss, perplexity and bits per byte on held-out text."""

    every: int = Field(default=0, ge=0, description="Evaluate every so many steps, and at the end; 0 never does.")
    batches: int = Field(
        default=0, ge=0, description="Micro-batches per corpus and evaluation; 0 takes the whole corpus."
    )


class SampleSection(Section):
    """Text written by the model during training, kept with the metrics."""

    prompts: tuple[str, ...] = Field(default=(), description="What the model is to continue.")
    every: int = Field(default=0, ge=0, description="Sample every so many steps; 0 never does.")
    tokens: int = Field(default=64, gt=0, description="Tokens to write per prompt.")
    temperature: float = Field(default=0.8, ge=0, description="0 takes the likeliest token; higher is more varied.")


class RunConfig(Section):
    """A whole run, validated."""

    run: RunSection
    model: ModelConfig
    tokenizer: TokenizerSection
    data: DataSection
    batch: BatchSection
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    learning_rate: LearningRateSection
    precision: PrecisionSection = Field(default_factory=PrecisionSection)
    recompute: RecomputeSection = Field(default_factory=RecomputeSection)
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    collectives: CollectivesSection = Field(default_factory=CollectivesSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    sample: SampleSection = Field(default_factory=SampleSection)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        values: dict[str, Any] = {}
        for name in type(self).model_fields:
            values.update(flat_values(name, getattr(self, name)))
        require(RUN_CHECKS, values)
        return self

    @property
    def micro_batches(self) -> int:
        """Micro-batches that each data-parallel rank takes per optimizer step."""
        return self.batch.global_batch // (self.batch.micro_batch * self.parallel.dp)

    @property
    def step_tokens(self) -> int:
        """Tokens per optimizer step, all ranks together."""
        return self.batch.global_batch * self.data.sequence_length
