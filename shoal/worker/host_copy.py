"""HostCopy: what a step sampled, on its way from the device to the host. Made and awaited by the model runner."""

from __future__ import annotations

import torch

from shoal.sampling.logprobs import to_host
from shoal.sampling.sampler import SampledTokens
from shoal.types.outputs import TokenLogprobs


class HostCopy:
    """Sampled tokens on their way to the host. On CUDA: pinned copies and an event; on CPU: the tensors themselves."""

    def __init__(self, sampled: SampledTokens) -> None:
        self._event: torch.cuda.Event | None = None
        self._token_ids = sampled.token_ids
        self._logprobs = sampled.logprobs
        if sampled.token_ids.is_cuda:
            self._token_ids = sampled.token_ids.to("cpu", non_blocking=True)
            if sampled.logprobs is not None:
                self._logprobs = sampled.logprobs.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def token_ids(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        return self._token_ids.tolist()

    def logprobs(self) -> list[TokenLogprobs | None] | None:
        """After `token_ids`. One entry a row, None for rows that asked for none; None when nobody asked."""
        return to_host(self._logprobs) if self._logprobs is not None else None
