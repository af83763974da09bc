"""ExpertsConfig: the experts of a mixture, as the families' readers find them. Part of ModelConfig."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """num_per_token: how many a token goes to. intermediate_size: of one expert. shared_size: width of what every token
    goes through beside them; 0: nothing.

    layers: which layers have experts; the others have an MLP of ModelConfig.intermediate_size.
    """

    num_experts: int
    num_per_token: int
    intermediate_size: int
    layers: tuple[int, ...]
    shared_size: int = 0
