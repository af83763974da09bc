"""The rank grid: data × pipeline × tensor parallel, and all arithmetic on ranks. Passed to whoever needs it.

Global rank = (data_rank * pipeline_size + pipeline_rank) * tensor_size + tensor_rank: the ranks of a tensor-parallel
group are neighbours, so they share a machine first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from shoal.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """Sizes of the three axes, and where this rank stands in them. The default is one rank alone.

    expert_parallel: tensor ranks share the experts of a layer whole, instead of a part of each.
    """

    data_size: int = 1
    pipeline_size: int = 1
    tensor_size: int = 1
    rank: int = 0
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("data_size", "pipeline_size", "tensor_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more; got {getattr(self, name)}")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} is outside the grid of {self.world_size} ranks")

    @property
    def world_size(self) -> int:
        return self.data_size * self.pipeline_size * self.tensor_size

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_size

    @property
    def pipeline_rank(self) -> int:
        return self.rank // self.tensor_size % self.pipeline_size

    @property
    def data_rank(self) -> int:
        return self.rank // (self.tensor_size * self.pipeline_size)

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    def rank_at(self, data_rank: int, pipeline_rank: int, tensor_rank: int) -> int:
        return (data_rank * self.pipeline_size + pipeline_rank) * self.tensor_size + tensor_rank

    def tensor_group(self) -> list[int]:
        """Global ranks that share this rank's layers, by tensor rank."""
        return [self.rank_at(self.data_rank, self.pipeline_rank, index) for index in range(self.tensor_size)]

    def pipeline_group(self) -> list[int]:
        """Global ranks that a token passes from this rank's first stage to its last."""
        return [self.rank_at(self.data_rank, index, self.tensor_rank) for index in range(self.pipeline_size)]

    def data_group(self) -> list[int]:
        """Global ranks that hold the same weights as this one."""
        return [self.rank_at(index, self.pipeline_rank, self.tensor_rank) for index in range(self.data_size)]

    def group(self, name: str) -> list[int]:
        """Global ranks of this rank's "world", "tensor", "pipeline" or "data" group, in the order of the group."""
        groups = {"tensor": self.tensor_group, "pipeline": self.pipeline_group, "data": self.data_group}
        return list(range(self.world_size)) if name == "world" else groups[name]()

    def tensor_slice(self, size: int, what: str) -> slice:
        """This rank's part of `size` rows or columns. ConfigError if they do not divide evenly; `what` names them."""
        if size % self.tensor_size:
            possible = [degree for degree in range(1, size + 1) if size % degree == 0 and degree <= 64]
            raise ConfigError(f"{what} ({size}) cannot be split over {self.tensor_size} ranks; these work: {possible}")
        part = size // self.tensor_size
        return slice(self.tensor_rank * part, (self.tensor_rank + 1) * part)

    def expert_slice(self, num_experts: int) -> slice:
        """This rank's experts where they are shared whole: runs that differ by one at most. ConfigError for more ranks
        than experts."""
        if self.tensor_size > num_experts:
            raise ConfigError(f"{num_experts} experts cannot be shared whole by {self.tensor_size} ranks")
        first, last = (num_experts * index // self.tensor_size for index in (self.tensor_rank, self.tensor_rank + 1))
        return slice(first, last)

    def kv_head_slice(self, num_kv_heads: int) -> slice:
        """This rank's KV heads. With more ranks than heads, groups of ranks hold copies of one head."""
        if num_kv_heads % self.tensor_size == 0:
            return self.tensor_slice(num_kv_heads, "KV heads")
        if self.tensor_size % num_kv_heads:
            raise ConfigError(f"{num_kv_heads} KV heads cannot be split or copied evenly over {self.tensor_size} ranks")
        head = self.tensor_rank // (self.tensor_size // num_kv_heads)
        return slice(head, head + 1)

    def layer_range(self, num_layers: int, partition: Sequence[int]) -> range:
        """Layers of this rank's pipeline stage. partition: layers per stage (`config.parallel.balance_layers`)."""
        if len(partition) != self.pipeline_size or sum(partition) != num_layers or min(partition) < 1:
            raise ConfigError(
                f"layer partition {','.join(map(str, partition))} must give each of {self.pipeline_size} stages "
                f"at least one layer, {num_layers} in all"
            )
        start = sum(partition[: self.pipeline_rank])
        return range(start, start + partition[self.pipeline_rank])
