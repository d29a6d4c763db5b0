"""What one rank is made of: its place, its stages, its optimizer, and the programs that it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytrain.buckets import part_elements
from pytrain.engine import Engine
from pytrain.errors import UserError
from pytrain.flops import forward_flops
from pytrain.grid import Grid, rank_map, read_rank_map, stage_layers, stage_ops
from pytrain.native import open_device
from pytrain.optimizer import AdamW
from pytrain.parallel import build_groups
from pytrain.pinned import pinned_buffers
from pytrain.schedule import Program, check, forward_only_pipeline, lower, programs_of
from pytrain.stage import Stage, native_policy, native_shape

if TYPE_CHECKING:
    from pytrain.collectives import Group
    from pytrain.config import RunConfig

EVALUATION_BATCHES = 8  # micro-batches per evaluation program: bounds what is in memory at once


@dataclass(frozen=True)
class StagePlan:
    """One stage of one rank, before it takes memory."""

    number: int
    """In the pipeline."""
    first_op: int
    last_op: int
    tp_rank: int
    tp_size: int
    slots: int
    """Micro-batches in flight."""
    evaluation_slots: int
    """The same where the programs of evaluation alone run."""
    gradient_buffers: int
    """Buffers for gradients that cross to other stages."""
    recompute: str
    shards: int
    """That each bucket is cut in by ZeRO."""
    part_elements: int
    """Of a bucket, at most, that travel at once."""
    zero: int
    """What lies as shards: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too."""
    defer_weight: bool
    sequence_parallel: bool
    reuse_activations: bool
    """Whether gradients take the place of activations that backward is done with."""


class Plan:
    """How a run is cut into stages, and the programs that they run. Takes no memory to speak of.

    Raises:
        UserError: a grid that the model cannot be cut into.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        parallel = config.parallel
        self._chunks = parallel.chunks if parallel.schedule == "interleaved" and parallel.pp > 1 else 1
        flops, layers = forward_flops(config.model, config.data.sequence_length), config.model.layers
        self.stage_layers = parallel.stage_layers or stage_layers(
            layers, parallel.pp, self._chunks, flops.head * layers / flops.layers
        )
        programs = programs_of(parallel.schedule, parallel.pp, config.micro_batches, self._chunks)
        self.training = lower(programs, tied=config.model.tied_head and parallel.pp > 1)
        self.evaluation = {
            count: lower(forward_only_pipeline(parallel.pp, count, self._chunks))
            for count in range(1, EVALUATION_BATCHES + 1)
        }

    def stages_of(self, pp_rank: int, tp_rank: int) -> list[StagePlan]:
        """The stages of the ranks at these coordinates."""
        config, parallel, stages = self.config, self.config.parallel, self.training.stages
        plans = []
        zero = parallel.zero if parallel.dp > 1 else 0  # one replica has nobody to share with
        defer_weight = parallel.schedule == "zero-bubble" and parallel.pp > 1
        for number in range(pp_rank, stages, parallel.pp):
            first_op, last_op = stage_ops(self.stage_layers, number)
            evaluation_slots = max(lowered.slots[number] for lowered in self.evaluation.values())
            plans.append(
                StagePlan(
                    number,
                    first_op,
                    last_op,
                    tp_rank,
                    parallel.tp,
                    max(self.training.slots[number], evaluation_slots),
                    evaluation_slots,
                    self.training.gradient_buffers[number],
                    config.recompute.of_stage(pp_rank),
                    parallel.dp if parallel.zero else 1,
                    part_elements(config),
                    zero,
                    defer_weight,
                    parallel.sequence_parallel,
                    config.micro_batches == 1 and zero < 2 and not defer_weight,
                )
            )
        return plans


class RankModel:
    """The model's part of one rank.

    Args:
        config: the whole run.
        world: all ranks; there must be dp * pp * tp of them.
        training: False leaves gradients, optimizer and kept activations out: the model only evaluates.

    Raises:
        UserError: another number of ranks, or a grid that the model cannot be cut into.
    """

    def __init__(self, config: RunConfig, world: Group, training: bool = True) -> None:
        self.config, self.training = config, training
        parallel, model = config.parallel, config.model
        wanted = parallel.dp * parallel.pp * parallel.tp
        if world.size != wanted:
            raise UserError(
                f"parallel.dp * pp * tp is {parallel.dp} * {parallel.pp} * {parallel.tp} = {wanted}, but there are "
                f"{world.size} ranks; start as many, for example with mpiexec -n {wanted}"
            )
        world = self._placed(world)
        self.grid = Grid(parallel.dp, parallel.pp, parallel.tp, world.rank)
        world.label = self.grid.label
        self.device = open_device(config.run.device, config.precision.fp16_sums, hip_products=config.run.hip_products)
        world.use_device(self.device)
        self.groups = build_groups(self.grid, world, native_shape(model), model.tied_head)
        self.plan = Plan(config)
        check(self.plan.training)
        plans = self.plan.stages_of(self.grid.pp_rank, self.grid.tp_rank)
        self.stages = {plan.number: self._stage(plan) for plan in plans}
        if training:
            stages = [(stage.layout, stage.shards) for stage in self.stages.values()]
            world.reserve_pinned(
                pinned_buffers(config, self.training_program, stages, self.grid.pp_rank, self.grid.tp_rank)
            )
        self._optimizer = AdamW(list(self.stages.values()), config.optimizer, self.groups) if training else None
        buffers = {plan.number: plan.gradient_buffers for plan in plans} if training else None
        self.engine = Engine(self.stages, self._optimizer, self.groups, buffers)

    @property
    def optimizer(self) -> AdamW:
        """Of all stages; a model that only evaluates has none."""
        assert self._optimizer is not None, "this model was built for evaluation only"
        return self._optimizer

    def _placed(self, world: Group) -> Group:
        """The world with its ranks numbered as the grid wants them."""
        parallel = self.config.parallel
        sizes = (parallel.dp, parallel.pp, parallel.tp)
        path = parallel.rank_map
        if path is not None:
            order = world.on_root(lambda: read_rank_map(Path(path), *sizes))
        else:
            order = rank_map(*sizes, parallel.rank_order)
        return world if order == list(range(world.size)) else world.subgroup("world", order)

    @property
    def needs_tokens(self) -> bool:
        """Whether this rank embeds tokens or takes the loss."""
        return self.grid.needs_tokens

    @property
    def training_program(self) -> Program:
        """This rank's part of a training step."""
        return self.plan.training.ranks[self.grid.pp_rank]

    def evaluation_program(self, micro_batches: int) -> Program:
        """This rank's part of a pass over up to EVALUATION_BATCHES micro-batches without gradients."""
        return self.plan.evaluation[micro_batches].ranks[self.grid.pp_rank]

    def _stage(self, plan: StagePlan) -> Stage:
        config = self.config
        return Stage(
            self.device,
            config.model,
            native_policy(config.precision),
            batch=config.batch.micro_batch,
            length=config.data.sequence_length,
            recompute=plan.recompute,
            first_op=plan.first_op,
            last_op=plan.last_op,
            tp_rank=plan.tp_rank,
            tp_size=plan.tp_size,
            slots=plan.slots if self.training else plan.evaluation_slots,
            shards=plan.shards,
            part_elements=plan.part_elements,
            training=self.training,
            whole_weights=plan.zero < 3 or not self.training,
            whole_gradients=plan.zero < 2,
            defer_weight=plan.defer_weight and self.training,
            sequence_parallel=plan.sequence_parallel,
            reuse_activations=plan.reuse_activations and self.training,
        )
