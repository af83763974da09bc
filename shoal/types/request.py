"""A request as the engine core sees it: token ids, never text."""

from __future__ import annotations

import msgspec

from shoal.types.adapter import AdapterRef
from shoal.types.pooling_params import PoolingParams
from shoal.types.sampling_params import SamplingParams


class EngineRequest(msgspec.Struct):
    """One sequence to generate. `n` answers are `n` of these, made by whoever accepted the request.

    prompt_token_ids: the rendered prompt.
    emitted_token_ids: tokens that an earlier engine emitted already (a continuation); they are not emitted again.
    sampling: resolved parameters: `seed` is drawn, `max_tokens` is set, stop token ids include the model's end tokens.
    priority: lower is served first; ties by arrival.
    pooling: of a request for a vector or scores in place of tokens. adapter: LoRA, of one that names it.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    emitted_token_ids: list[int] = []
    priority: int = 0
    arrival_time: float = 0.0
    pooling: PoolingParams | None = None
    adapter: AdapterRef | None = None
