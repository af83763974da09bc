"""PoolingParams: what a client may say of the vector or score that is made of its text. Names as in vLLM."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from shoal.errors import InvalidRequestError


class PoolingParams(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Parameters of one request.

    task: "embed" or "score", where only one of them will do.
    dimensions: the first so many numbers of an embedding, normalised again (matryoshka representations, Kusupati et al.
    2022); None: all. use_activation: embeddings: whether they are normalised to length 1; scores: whether a sigmoid (or
    what the model names) is applied; None: as the model says.
    first_segment: tokens of the first of two texts, for encoders that tell them apart; set by whoever makes the pair.
    Raises InvalidRequestError, naming the field, for a wrong value.
    """

    n: ClassVar[int] = 1  # answers, as of SamplingParams

    task: str | None = None
    dimensions: int | None = None
    use_activation: bool | None = None
    first_segment: int | None = None

    def __post_init__(self) -> None:
        if self.dimensions is not None and (type(self.dimensions) is not int or self.dimensions < 1):
            raise InvalidRequestError(f"dimensions must be 1 or more; got {self.dimensions!r:.50}", "dimensions")
        if self.use_activation is not None and not isinstance(self.use_activation, bool):
            raise InvalidRequestError(
                f"use_activation must be true or false; got {self.use_activation!r:.50}", "use_activation"
            )
