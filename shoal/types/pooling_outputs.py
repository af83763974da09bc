"""What LLM.embed and LLM.score return, in the shapes that vLLM's users know."""

from __future__ import annotations

import msgspec


class EmbeddingOutput(msgspec.Struct):
    """The vector of one text."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


class EmbeddingRequestOutput(msgspec.Struct):
    """A text and its vector. prompt: None where token ids came in."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    num_cached_tokens: int = 0
    finished: bool = True


class ScoringOutput(msgspec.Struct):
    """How well two texts belong together: higher is better."""

    score: float


class ScoringRequestOutput(msgspec.Struct):
    """A pair of texts and its score. prompt_token_ids: of the pair; of two embeddings, of one and then the other."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: ScoringOutput
    num_cached_tokens: int = 0
    finished: bool = True
