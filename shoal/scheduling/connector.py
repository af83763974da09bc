"""The scheduler's side of KV transfer: what an injected connector may tell and learn. The default knows nothing."""

from __future__ import annotations

from typing import Protocol

from shoal.types.request import EngineRequest


class KVConnector(Protocol):
    """Lets KV cache that was computed elsewhere enter, and KV cache computed here leave."""

    def num_matched_tokens(self, request: EngineRequest, num_local_tokens: int) -> tuple[int, bool]:
        """Tokens beyond `num_local_tokens` whose KV exists outside, and whether loading them takes steps of its own.

        With True the request waits as WAITING_FOR_KV until `finished_loading` names it. Asked again, so without side
        effects, while there is no room. At least the last token is computed here, whatever is matched.
        """
        ...

    def update_after_allocation(self, request: EngineRequest, block_ids: list[int], num_external_tokens: int) -> None:
        """Blocks for the matched tokens are allocated: loading may start."""
        ...

    def delay_free(self, request_id: str, block_ids: list[int]) -> bool:
        """The request ended. True keeps its blocks until `finished_sending` names it.

        Not asked for one that ends while it waits for KV: its blocks stay until `finished_loading` names it.
        """
        ...

    def finished_loading(self) -> list[str]:
        """Requests whose external KV has arrived since the last call; those that ended meanwhile are named too."""
        ...

    def finished_sending(self) -> list[str]:
        """Ended requests whose blocks may go now, since the last call."""
        ...


class NullConnector:
    """No KV transfer."""

    def num_matched_tokens(self, request: EngineRequest, num_local_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_after_allocation(self, request: EngineRequest, block_ids: list[int], num_external_tokens: int) -> None:
        return None

    def delay_free(self, request_id: str, block_ids: list[int]) -> bool:
        return False

    def finished_loading(self) -> list[str]:
        return []

    def finished_sending(self) -> list[str]:
        return []
