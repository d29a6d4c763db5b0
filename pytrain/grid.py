"""Where a rank stands: its data-parallel, pipeline and tensor-parallel coordinates, tp fastest."""

from dataclasses import dataclass

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
    def label(self) -> str:
        """For log lines that come from one rank."""
        return f"dp{self.dp_rank}/{self.dp} pp{self.pp_rank}/{self.pp} tp{self.tp_rank}/{self.tp}"

    def stage_ops(self, layers: int) -> tuple[int, int]:
        """[first, last) ops of this rank's stage: layers cut evenly, the ends on the first and last stage.

        Raises:
            UserError: fewer layers than stages.
        """
        if layers < self.pp:
            raise UserError(f"parallel.pp ({self.pp}) is more than model.layers ({layers}); lower it")
        first, last = (layers * (self.pp_rank + edge) // self.pp for edge in (0, 1))
        first_op = 0 if self.pp_rank == 0 else 1 + 4 * first
        last_op = 4 * layers + 4 if self.pp_rank == self.pp - 1 else 1 + 4 * last
        return first_op, last_op
