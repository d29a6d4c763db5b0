"""Rules that involve more than one key.

They are kept apart from the field types because the loader reports everything at once: when one key is
mistyped, the rules that do not involve it must still run. Each rule names the keys that it needs and
gets their values.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

ROPE_THETA = 10000.0


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: the dotted key to blame and a sentence that starts with it."""

    key: str
    sentence: str


@dataclass(frozen=True)
class Check:
    """A rule over the values of `keys`: `explain` gives None or a sentence about `keys[0]`."""

    keys: tuple[str, ...]
    explain: Callable[..., str | None]


def find_problems(checks: tuple[Check, ...], values: Mapping[str, object]) -> list[Problem]:
    """Run every check whose keys are all in `values` (dotted key -> value)."""
    problems = []
    for check in checks:
        if all(key in values for key in check.keys):
            sentence = check.explain(*(values[key] for key in check.keys))
            if sentence is not None:
                problems.append(Problem(check.keys[0], sentence))
    return problems


def _hidden_and_heads(hidden: int, heads: int, head_size: int) -> str | None:
    if head_size > 0:
        return None
    return (
        f"model.hidden ({hidden}) is not divisible by model.heads ({heads}); "
        f"change one of them, or set model.head_size"
    )


def _grouped_heads(heads: int, kv_heads: int) -> str | None:
    if heads % kv_heads == 0:
        return None
    divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    return f"model.heads ({heads}) is not divisible by model.kv_heads ({kv_heads}); kv_heads may be {divisors}"


def _rotary_head_size(head_size: int, family: str) -> str | None:
    if family != "llama" or head_size % 2 == 0:
        return None
    return f"model.head_size ({head_size}) is odd, but rotary positions turn pairs of channels; make it even"


def _ffn_given(ffn: int, family: str, hidden: int) -> str | None:
    if ffn > 0:
        return None
    usual = -(-8 * hidden // 3 // 256) * 256
    return f"model.ffn is missing and {family} has no default for it; usual for hidden = {hidden} is {usual}"


def _rotary_only(family: str, rope_theta: float, rope_scaling: object) -> str | None:
    if family == "llama" or (rope_theta == ROPE_THETA and rope_scaling is None):
        return None
    return (
        f'model.family "{family}" has learned positions, so model.rope_theta and model.rope_scaling would do '
        f"nothing; remove them"
    )


MODEL_CHECKS = (
    Check(("model.hidden", "model.heads", "model.head_size"), _hidden_and_heads),
    Check(("model.heads", "model.kv_heads"), _grouped_heads),
    Check(("model.head_size", "model.family"), _rotary_head_size),
    Check(("model.ffn", "model.family", "model.hidden"), _ffn_given),
    Check(("model.family", "model.rope_theta", "model.rope_scaling"), _rotary_only),
)


def _sequence_fits(sequence_length: int, context: int) -> str | None:
    if sequence_length <= context:
        return None
    return (
        f"data.sequence_length ({sequence_length}) is longer than model.context ({context}); "
        f"shorten it or raise model.context"
    )


def _whole_micro_batches(global_batch: int, micro_batch: int, dp: int) -> str | None:
    unit = micro_batch * dp
    if global_batch % unit == 0:
        return None
    below = global_batch // unit * unit
    batches = " or ".join(map(str, filter(None, (below, below + unit))))
    advice = f"with this dp it may be {batches}"
    whole, rest = divmod(global_batch, micro_batch)
    if rest == 0:
        divisors = [count for count in range(1, whole + 1) if whole % count == 0]
        fewer = [count for count in divisors if count < dp][-1:]
        more = [count for count in divisors if count > dp][:1]
        advice += f", and with this batch parallel.dp may be {' or '.join(map(str, fewer + more))}"
    return (
        f"batch.global_batch ({global_batch}) is not divisible by batch.micro_batch * parallel.dp "
        f"({micro_batch} * {dp}); {advice}"
    )


def _warmup_fits(warmup_steps: int, steps: int) -> str | None:
    if warmup_steps <= steps:
        return None
    return f"learning_rate.warmup_steps ({warmup_steps}) is more than run.steps ({steps}); shorten it"


def _minimum_below_peak(minimum: float, peak: float) -> str | None:
    if minimum <= peak:
        return None
    return f"learning_rate.minimum ({minimum:g}) is above learning_rate.peak ({peak:g}); lower it"


def _decay_steps(decay_steps: int, schedule: str, warmup_steps: int, steps: int) -> str | None:
    if schedule != "wsd":
        if decay_steps == 0:
            return None
        return (
            f'learning_rate.decay_steps only belongs to schedule "wsd", and the schedule is "{schedule}"; '
            f"remove it or change learning_rate.schedule"
        )
    if decay_steps == 0:
        return f'learning_rate.decay_steps is missing and "wsd" needs it; usual is {max(steps // 10, 1)}'
    if warmup_steps + decay_steps <= steps:
        return None
    return (
        f"learning_rate.decay_steps ({decay_steps}) and learning_rate.warmup_steps ({warmup_steps}) together "
        f"are more than run.steps ({steps}); shorten one"
    )


_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def _master_is_wide_enough(master: str, dtype: str) -> str | None:
    if master == dtype or _BYTES[master] > _BYTES[dtype]:
        return None
    return f'precision.master "{master}" is no wider than precision.dtype "{dtype}"; use "fp32" or "{dtype}"'


def _loss_scale_for_fp16(loss_scale: float, dtype: str) -> str | None:
    if dtype == "fp16" or loss_scale == 1.0:
        return None
    return f'precision.loss_scale ({loss_scale:g}) is for "fp16", and precision.dtype is "{dtype}"; remove it'


def _one_policy_per_stage(policy: tuple[str, ...], pp: int) -> str | None:
    if len(policy) in (1, pp):
        return None
    return f"recompute.policy has {len(policy)} entries; give one for all stages, or parallel.pp ({pp}) of them"


def _kept_steps_are_saved(keep_every: int, every: int) -> str | None:
    if keep_every == 0 or (every > 0 and keep_every % every == 0):
        return None
    nearest = max(keep_every // every, 1) * every if every > 0 else 0
    return f"checkpoint.keep_every ({keep_every}) is not a multiple of checkpoint.every ({every}); {nearest} would be"


def _something_to_evaluate(every: int, heldout: tuple[object, ...]) -> str | None:
    if every == 0 or heldout:
        return None
    return f"evaluation.every is {every}, but data.heldout is empty; add a held-out corpus or set it to 0"


def _something_to_sample(every: int, prompts: tuple[str, ...]) -> str | None:
    if every == 0 or prompts:
        return None
    return f"sample.every is {every}, but sample.prompts is empty; add a prompt or set it to 0"


def _zero_with_pipeline(zero: int, schedule: str, tied_head: bool, pp: int) -> str | None:
    """Gradient shards are summed as each micro-batch leaves a layer, which these two leave no moment for."""
    if zero <= 1 or pp == 1:
        return None
    if schedule == "zero-bubble":
        return (
            f'parallel.zero {zero} does not go with schedule "zero-bubble", which keeps the gradients of all layers '
            f"open between its two backward passes; use zero 1, or another schedule"
        )
    if tied_head:
        return (
            f"parallel.zero {zero} does not go with model.tied_head over parallel.pp {pp} stages: the first and the "
            f"last add their gradients of one matrix before these are cut in shards; use zero 1, or pp 1"
        )
    return None


def _samples_need_whole_weights(every: int, zero: int, dp: int) -> str | None:
    if every == 0 or zero < 3 or dp == 1:
        return None
    return (
        f"sample.every is {every}, but no rank holds the whole model with parallel.zero 3; "
        f"set it to 0 and use `pytrain generate` on a checkpoint"
    )


def _rows_for_sequence_parallelism(
    sequence_parallel: bool, tp: int, micro_batch: int, sequence_length: int
) -> str | None:
    rows = micro_batch * sequence_length
    if not sequence_parallel or rows >= tp:
        return None
    return (
        f"parallel.sequence_parallel splits the {rows} tokens of a micro-batch (batch.micro_batch * "
        f"data.sequence_length) over parallel.tp ({tp}) ranks, which leaves some without any; set it to false"
    )


def _one_16_bit_type(reduction: str, gradients: str) -> str | None:
    if reduction == gradients or "fp32" in (reduction, gradients):
        return None
    return (
        f'precision.gradient_reduction ("{reduction}") and precision.gradients ("{gradients}") are two 16-bit types, '
        f'and neither holds what the other does; make them equal, or one of them "fp32"'
    )


def _samples_need_one_stage(every: int, pp: int) -> str | None:
    if every == 0 or pp == 1:
        return None
    return (
        f"sample.every is {every}, but with parallel.pp {pp} no rank holds all layers; "
        f"set it to 0 and use `pytrain generate` on a checkpoint"
    )


def _chunks_for_interleaving(chunks: int, schedule: str, pp: int) -> str | None:
    if schedule == "interleaved":
        if chunks > 1 and pp > 1:
            return None
        return f"parallel.chunks ({chunks}) and parallel.pp ({pp}) must both be at least 2 for interleaved"
    if chunks == 1:
        return None
    return f'parallel.chunks is {chunks}, but only schedule "interleaved" has several per rank; set it to 1'


def _stages_of_layers(stage_layers: tuple[int, ...], layers: int, pp: int, chunks: int) -> str | None:
    if not stage_layers or (
        len(stage_layers) == pp * chunks and sum(stage_layers) == layers and min(stage_layers) > 0
    ):
        return None
    return (
        f"parallel.stage_layers {list(stage_layers)} must have parallel.pp * parallel.chunks = {pp * chunks} entries "
        f"of at least 1 that add up to model.layers ({layers})"
    )


def _full_recompute_now(policy: tuple[str, ...], schedule: str, pp: int) -> str | None:
    if "full" not in policy or schedule != "zero-bubble" or pp == 1:
        return None
    return (
        'recompute.policy "full" does not go with schedule "zero-bubble", whose weight gradients come late; '
        "use none or selective"
    )


HIP_LARGEST_HEAD = 256
"""The widest head that native/hip/kernels compiles attention for."""


def head_fits_hip(device: str, head_size: int) -> str | None:
    """Why the GPU has no attention for heads of this size, if it has none."""
    if device != "hip" or head_size <= HIP_LARGEST_HEAD:
        return None
    return (
        f'run.device "hip" has attention for heads of up to {HIP_LARGEST_HEAD} channels, and model.head_size is '
        f'{head_size}; use more heads, or run.device "cpu"'
    )


def _chains_of_fp16(fp16_sums: str, dtype: str, device: str) -> str | None:
    if fp16_sums == "fp32" or (dtype == "fp16" and device == "cpu"):
        return None
    return (
        f'precision.fp16_sums "{fp16_sums}" is for fp16 matrices on a CPU, but precision.dtype is "{dtype}" and '
        f'run.device "{device}"; leave it out, or set both'
    )


def _direct_buffers_of_a_gpu(device_buffers: str, device: str) -> str | None:
    if device_buffers == "staged" or device == "hip":
        return None
    return (
        f'collectives.device_buffers "{device_buffers}" is about arrays in a GPU\'s memory, and run.device is '
        f'"{device}"; remove it, or set run.device to "hip"'
    )


def _products_of_a_gpu(hip_products: str, device: str) -> str | None:
    if hip_products == "own" or device == "hip":
        return None
    return (
        f'run.hip_products "{hip_products}" is about products on a GPU, and run.device is "{device}"; remove it, or '
        'set run.device to "hip"'
    )


RUN_CHECKS = (
    *MODEL_CHECKS,
    Check(("data.sequence_length", "model.context"), _sequence_fits),
    Check(("batch.global_batch", "batch.micro_batch", "parallel.dp"), _whole_micro_batches),
    Check(("learning_rate.warmup_steps", "run.steps"), _warmup_fits),
    Check(("learning_rate.minimum", "learning_rate.peak"), _minimum_below_peak),
    Check(
        ("learning_rate.decay_steps", "learning_rate.schedule", "learning_rate.warmup_steps", "run.steps"),
        _decay_steps,
    ),
    Check(("precision.master", "precision.dtype"), _master_is_wide_enough),
    Check(("precision.loss_scale", "precision.dtype"), _loss_scale_for_fp16),
    Check(("recompute.policy", "parallel.pp"), _one_policy_per_stage),
    Check(("checkpoint.keep_every", "checkpoint.every"), _kept_steps_are_saved),
    Check(("evaluation.every", "data.heldout"), _something_to_evaluate),
    Check(("sample.every", "sample.prompts"), _something_to_sample),
    Check(("parallel.zero", "parallel.schedule", "model.tied_head", "parallel.pp"), _zero_with_pipeline),
    Check(("sample.every", "parallel.zero", "parallel.dp"), _samples_need_whole_weights),
    Check(
        ("parallel.sequence_parallel", "parallel.tp", "batch.micro_batch", "data.sequence_length"),
        _rows_for_sequence_parallelism,
    ),
    Check(("precision.gradient_reduction", "precision.gradients"), _one_16_bit_type),
    Check(("sample.every", "parallel.pp"), _samples_need_one_stage),
    Check(("parallel.chunks", "parallel.schedule", "parallel.pp"), _chunks_for_interleaving),
    Check(("parallel.stage_layers", "model.layers", "parallel.pp", "parallel.chunks"), _stages_of_layers),
    Check(("recompute.policy", "parallel.schedule", "parallel.pp"), _full_recompute_now),
    Check(("run.device", "model.head_size"), head_fits_hip),
    Check(("precision.fp16_sums", "precision.dtype", "run.device"), _chains_of_fp16),
    Check(("collectives.device_buffers", "run.device"), _direct_buffers_of_a_gpu),
    Check(("run.hip_products", "run.device"), _products_of_a_gpu),
)
