"""What a model may be asked for: text, or vectors and scores of texts. RequestPreparer checks it here."""

from __future__ import annotations

from shoal.config.model_config import ModelConfig
from shoal.config.pooling import PoolingConfig
from shoal.errors import InvalidRequestError
from shoal.protocol.errors import NOT_THIS_KIND
from shoal.types.pooling_params import PoolingParams

_WAYS = {
    "embed": "this model makes embeddings (/v1/embeddings, /v1/score and /v1/rerank; LLM.embed and LLM.score)",
    "score": "this model makes scores (/v1/score and /v1/rerank; LLM.score)",
}


def what_it_does(pooling: PoolingConfig | None) -> str:
    """For the error of whoever asks for something else."""
    if pooling is None:
        return (
            "this model generates text (/v1/chat/completions, /v1/completions; LLM.chat, LLM.generate); embeddings and "
            "scores need a server of a model for them, or of this one with --runner pooling"
        )
    return f"{_WAYS[pooling.task]}, and nothing else"


def check_pooling(params: PoolingParams, model: ModelConfig) -> PoolingParams:
    """Raise InvalidRequestError for what this model cannot do of it."""
    pooling = model.pooling
    if pooling is None:
        raise InvalidRequestError(what_it_does(None), "model", NOT_THIS_KIND)
    if params.task not in (None, pooling.task):
        raise InvalidRequestError(what_it_does(pooling), "model", NOT_THIS_KIND)
    wanted = params.dimensions
    if wanted is None:
        return params
    if pooling.task != "embed":
        raise InvalidRequestError("dimensions is for embeddings; scores have none", "dimensions")
    possible, most = pooling.dimensions, pooling.embedding_size(model.hidden_size)
    if possible is None and wanted > most:
        raise InvalidRequestError(f"dimensions must be from 1 to {most} for this model; got {wanted}", "dimensions")
    if possible is not None and wanted not in possible:
        only = len(possible) == 1
        raise InvalidRequestError(
            f"dimensions {wanted} is none of this model's: {', '.join(map(str, possible))}"
            + (
                "; where it was trained for shorter ones, --hf-overrides '{\"is_matryoshka\": true}' says so"
                if only
                else ""
            ),
            "dimensions",
        )
    return params
