"""Where a rank stands: its data-parallel, pipeline and tensor-parallel coordinates, tp fastest."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytrain.errors import UserError


@dataclass(frozen=True)
class Grid:
    """The coordinates of one rank in a grid of dp x pp x tp ranks."""

    dp: int = 1
    pp: int = 1
    tp: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if min(self.dp, self.pp, self.tp) < 1:
            raise UserError(f"a grid of dp {self.dp} x pp {self.pp} x tp {self.tp} has no ranks")
        if not 0 <= self.rank < self.size:
            raise UserError(f"rank {self.rank} is outside the grid of {self.size} ranks")

    @property
    def size(self) -> int:
        """Ranks in the grid."""
        return self.dp * self.pp * self.tp

    @property
    def tp_rank(self) -> int:
        """Which tensor-parallel slice this rank holds."""
        return self.rank % self.tp

    @property
    def pp_rank(self) -> int:
        """Which pipeline stage this rank runs."""
        return self.rank // self.tp % self.pp

    @property
    def dp_rank(self) -> int:
        """Which replica this rank belongs to."""
        return self.rank // (self.tp * self.pp)

    @property
    def needs_tokens(self) -> bool:
        """Whether this rank embeds tokens or takes the loss."""
        return self.pp_rank in (0, self.pp - 1)

    @property
    def label(self) -> str:
        """For log lines that come from one rank."""
        return f"dp{self.dp_rank}/{self.dp} pp{self.pp_rank}/{self.pp} tp{self.tp_rank}/{self.tp}"

    def tp_group(self) -> list[int]:
        """Ranks that hold the slices of this rank's stage and replica, in order."""
        return self._line(1, self.tp, self.tp_rank)

    def pp_group(self) -> list[int]:
        """Ranks that run the stages of this rank's replica and slice, in the order of the pipeline."""
        return self._line(self.tp, self.pp, self.pp_rank)

    def dp_group(self) -> list[int]:
        """Ranks that hold the replicas of this rank's stage and slice, in order."""
        return self._line(self.tp * self.pp, self.dp, self.dp_rank)

    def embedding_group(self) -> list[int]:
        """The first and the last stage of this rank's pipeline, which share a tied embedding; on the stages
        between them, and where there is one stage, this rank alone.
        """
        if self.pp_rank not in (0, self.pp - 1) or self.pp == 1:
            return [self.rank]
        stages = self.pp_group()
        return [stages[0], stages[-1]]

    def _line(self, stride: int, length: int, position: int) -> list[int]:
        first = self.rank - position * stride
        return list(range(first, first + length * stride, stride))


def stage_layers(layers: int, pp: int, chunks: int = 1, head: float = 0.0) -> tuple[int, ...]:
    """Layers of each pipeline stage: as even as whole layers allow, head and loss counted as layers too.

    The slowest rank sets the pace of a pipeline, so the ranks are balanced first (the last of them has the head), and
    then the stages of each rank. Every stage has a layer.

    Args:
        layers: of the model.
        pp: ranks of the pipeline.
        chunks: stages of each rank; rank r has stages r, r + pp, ...
        head: work of the head, in layers.

    Raises:
        UserError: fewer layers than stages.
    """
    if layers < pp * chunks:
        raise UserError(
            f"parallel.pp times parallel.chunks is {pp * chunks}, more than model.layers ({layers}); lower them"
        )
    ranks = _shares(layers, pp, head, least=chunks)
    of_rank = [_shares(count, chunks, head if rank == pp - 1 else 0.0) for rank, count in enumerate(ranks)]
    return tuple(of_rank[stage % pp][stage // pp] for stage in range(pp * chunks))


def _shares(count: int, parts: int, extra: float, least: int = 1) -> list[int]:
    """`count` in `parts` of at least `least`, so that the largest, the last with `extra`, is as small as can be."""
    if parts == 1:
        return [count]
    others = parts - 1
    last = min(
        range(least, count - least * others + 1),
        key=lambda last: (max(-(-(count - last) // others), last + extra), -last),
    )
    rest = count - last
    return [*(rest * (part + 1) // others - rest * part // others for part in range(others)), last]


def stage_ops(counts: Sequence[int], stage: int) -> tuple[int, int]:
    """[first, last) ops of a pipeline stage, from the layers of each: embedding and head are at the ends."""
    first = sum(counts[:stage])
    last = first + counts[stage]
    return 0 if stage == 0 else 1 + 4 * first, 1 + 4 * last + (3 if stage == len(counts) - 1 else 0)


AXES = ("dp", "pp", "tp")


def rank_map(dp: int, pp: int, tp: int, order: str = "dp-pp-tp") -> list[int]:
    """Which of the launcher's ranks takes each place of the grid (places are numbered with tp fastest).

    `world.subgroup("world", rank_map(...))` puts every rank into its place.

    Args:
        dp: replicas.
        pp: stages.
        tp: slices.
        order: the axes from the slowest to the fastest in the launcher's numbering; "pp-dp-tp" keeps the
            replicas of a stage on neighbouring ranks.

    Raises:
        UserError: not an order of the three axes.
    """
    sizes = {"dp": dp, "pp": pp, "tp": tp}
    axes = order.split("-")
    if sorted(axes) != sorted(AXES):
        raise UserError(f'the order of ranks "{order}" must name dp, pp and tp once each, such as "dp-pp-tp"')
    strides, stride = {}, 1
    for axis in reversed(axes):
        strides[axis] = stride
        stride *= sizes[axis]
    return [
        d * strides["dp"] + p * strides["pp"] + t * strides["tp"]
        for d in range(dp)
        for p in range(pp)
        for t in range(tp)
    ]


def read_rank_map(path: Path, dp: int, pp: int, tp: int) -> list[int]:
    """As `rank_map`, from a text file: line r has the coordinates `dp pp tp` of the launcher's rank r.

    Empty lines and what follows a # are passed over.

    Raises:
        UserError: the file cannot be read, or does not give every place to one rank.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    lines = [line.partition("#")[0].split() for line in text.splitlines()]
    rows = [row for row in lines if row]
    places: dict[int, int] = {}
    for rank, row in enumerate(rows):
        if len(row) != len(AXES) or not all(word.isdecimal() for word in row):
            raise UserError(f"{path}: rank {rank} needs three numbers, dp pp tp, not {' '.join(row)!r}")
        d, p, t = map(int, row)
        place = (d * pp + p) * tp + t
        if not (d < dp and p < pp and t < tp):
            raise UserError(f"{path}: rank {rank} is at {d} {p} {t}, outside the grid of {dp} x {pp} x {tp}")
        if place in places:
            raise UserError(f"{path}: ranks {places[place]} and {rank} are both at {d} {p} {t}")
        places[place] = rank
    if len(places) != dp * pp * tp:
        raise UserError(f"{path} places {len(places)} ranks, but the grid {dp} x {pp} x {tp} has {dp * pp * tp}")
    return [places[place] for place in range(len(places))]
