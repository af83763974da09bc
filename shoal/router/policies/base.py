"""What a policy sees and what it is told: plain data, no clock, no sockets. The pool and failover call policies.

For each attempt: `pick` chooses; then `started` when the request is being sent to the chosen backend, and exactly one
`finished` when it is over there, however it ended. All calls come from one thread.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from random import Random
from typing import ClassVar


@dataclasses.dataclass(slots=True)
class BackendView:
    """One server as a policy sees it. The owner keeps one a backend and changes its fields as they change.

    key: its URL, or what else names it for good. weight: above 0. num_running: requests sent there that have not ended.
    outstanding_tokens: of those, the tokens of prompts that nothing was answered to, and the tokens still to generate
    (estimates). num_waiting, kv_usage (0 to 1): as last reported. speed: measured tokens a second, None while unknown.
    """

    key: str
    weight: float = 1.0
    num_running: int = 0
    outstanding_tokens: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    speed: float | None = None


@dataclasses.dataclass(slots=True)
class RequestView:
    """One request as a policy sees it; the same object in `pick`, `started` and `finished`.

    session: what ties requests together (a header, the body's `user`), if anything does. blocks: of `prefix_blocks`,
    needed only by policies with `needs_blocks`. num_prompt_tokens, num_output_tokens: estimates.
    """

    request_id: str
    session: str | None = None
    blocks: Sequence[int] = ()
    num_prompt_bytes: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    priority: int = 0

    @property
    def num_tokens(self) -> int:
        """What it adds to a backend's outstanding tokens; never 0, so that requests without an estimate count too."""
        return max(self.num_prompt_tokens + self.num_output_tokens, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """Knobs of policies. One that a policy has no use for is refused by `create_policy`, unless it is at its default.

    by_speed: weights are multiplied by the measured speed. load_factor: how far above the mean a backend's outstanding
    work may be when it is chosen for what it has cached, or for a session. max_blocks: blocks remembered per backend.
    """

    by_speed: bool = False
    load_factor: float = 1.25
    max_blocks: int = 32768


class Policy(abc.ABC):
    """Chooses a backend for a request. Made by `create_policy`."""

    # Whether it reads RequestView.blocks; the router computes them only then.
    needs_blocks: ClassVar[bool] = False
    # Whether it reads RequestView.session.
    needs_session: ClassVar[bool] = False
    # The fields of PolicyOptions that it has a use for.
    used_options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, options: PolicyOptions, random: Random) -> None:
        self.options = options
        self.random = random

    @abc.abstractmethod
    def pick(self, request: RequestView, candidates: Sequence[BackendView]) -> int:
        """The index of the backend to send the request to. `candidates`: at least one, each key once, any order.

        Candidates may differ from call to call: backends come, go, are full, or were tried before.
        """

    def started(self, key: str, request: RequestView) -> None:  # noqa: B027
        """The request is being sent to this backend."""

    def finished(  # noqa: B027
        self,
        key: str,
        request: RequestView,
        num_cached_tokens: int | None,
        num_prompt_tokens: int | None,
        seconds: float,
    ) -> None:
        """It is over there. num_cached_tokens, num_prompt_tokens: as the server counted; None when it did not say."""

    def removed(self, key: str) -> None:  # noqa: B027
        """The backend is gone for good, or was restarted: nothing that was known of it holds any more."""
