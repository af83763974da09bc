"""What users and every floor speak of: sampling parameters, requests and their outputs. Plain data, no torch."""

from shoal.types.adapter import AdapterRef, LoRARequest
from shoal.types.outputs import CompletionOutput, FinishReason, Logprob, RequestOutput, RequestUpdate, TokenLogprobs
from shoal.types.pooling_outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from shoal.types.pooling_params import PoolingParams
from shoal.types.request import EngineRequest
from shoal.types.sampling_params import SamplingParams

__all__ = [
    "AdapterRef",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineRequest",
    "FinishReason",
    "LoRARequest",
    "Logprob",
    "PoolingParams",
    "RequestOutput",
    "RequestUpdate",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "TokenLogprobs",
]
