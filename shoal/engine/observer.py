"""EngineObserver: AsyncEngine tells it what happens, for someone above to count. The server feeds its metrics so."""

from __future__ import annotations

from shoal.engine.prepare import PreparedRequest
from shoal.messages import EngineStats
from shoal.types.outputs import FinishReason


class EngineObserver:
    """Called on the engine's event loop, between tokens: return at once. The base ignores everything.

    Every request_started(request) is followed by exactly one finished(request, index, …) for each of its
    `request.params.n` answers, but for those of a continuation that had ended elsewhere.
    """

    def request_started(self, request: PreparedRequest) -> None:
        """The request is queued."""

    def first_token(self, request: PreparedRequest, index: int, seconds: float) -> None:
        """Answer `index` has its first token, `seconds` after it was queued."""

    def tokens(self, request: PreparedRequest, index: int, num_tokens: int, seconds: float) -> None:
        """Answer `index` has `num_tokens` more tokens, `seconds` after its previous ones. Not called for the first."""

    def finished(
        self, request: PreparedRequest, index: int, reason: FinishReason, num_tokens: int, seconds: float
    ) -> None:
        """Answer `index` has ended with `num_tokens` tokens, `seconds` after it was queued."""

    def stats(self, stats: EngineStats, replica: int) -> None:
        """A core sent its numbers, as it does a few times a second while it works."""
