"""What users and every floor speak of: sampling parameters, requests and their outputs. Plain data, no torch."""

from shoal.types.outputs import CompletionOutput, FinishReason, Logprob, RequestOutput, RequestUpdate, TokenLogprobs
from shoal.types.request import EngineRequest
from shoal.types.sampling_params import SamplingParams

__all__ = [
    "CompletionOutput",
    "EngineRequest",
    "FinishReason",
    "Logprob",
    "RequestOutput",
    "RequestUpdate",
    "SamplingParams",
    "TokenLogprobs",
]
