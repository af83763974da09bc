"""/v1/embeddings, /v1/score and /v1/rerank: bodies as OpenAI, vLLM, Jina and Cohere have them, and answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Field

from shoal.errors import InvalidRequestError
from shoal.protocol.fields import GiveUpEarly, RequestBody, Strings, TokenIds
from shoal.protocol.neutral import Neutral
from shoal.protocol.pairs import make_pairs
from shoal.types.pooling_params import PoolingParams

Inputs = str | Strings | TokenIds | Annotated[list[TokenIds], GiveUpEarly()]
Documents = Annotated[list[str | dict[str, Any]], GiveUpEarly()]
_LABEL = Neutral(anything=True)
_CUT = Neutral(instead="truncate_prompt_tokens cuts what is too long; documents are not read in pieces")


class PoolingBody(RequestBody):
    """What the three share."""

    neutral: ClassVar[Mapping[str, Neutral]] = {
        "user": _LABEL,
        "metadata": _LABEL,
        "add_special_tokens": Neutral((True,), "texts are always tokenized with them; send token ids to do without"),
        "mm_processor_kwargs": Neutral(({},), "this model reads text only; leave it out"),
        "truncation_side": Neutral(("right",), "texts are cut at their end"),
    }

    truncate_prompt_tokens: int | None = Field(None, description="Most tokens of a text; -1: what the model takes.")
    use_activation: bool | None = Field(
        None, description="Embeddings: normalise; scores: sigmoid. Default: the model's."
    )
    priority: int | None = Field(None, description="Lower goes first, with --scheduling-policy priority.")

    def params(self) -> PoolingParams:
        """Raises InvalidRequestError, naming the field."""
        return PoolingParams(use_activation=self.use_activation)


class EmbeddingRequest(PoolingBody):
    """The OpenAI API's, with vLLM's additions."""

    neutral: ClassVar[Mapping[str, Neutral]] = {
        **PoolingBody.neutral,
        "embed_dtype": Neutral(("float32",), "numbers are fp32; leave it out"),
        "endianness": Neutral(("native", "little"), "base64 is of little-endian numbers; leave it out"),
    }

    input: Inputs = Field(description="Text or token ids, or a list of either for several texts.")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: of little-endian fp32.")
    dimensions: int | None = Field(None, description="Only the first so many numbers, normalised again.")
    normalize: bool | None = Field(None, description="Another name of use_activation.")

    def inputs(self) -> list[str | list[int]]:
        """One or more texts. Raises InvalidRequestError for none, or an empty one."""
        given: Any = self.input
        inputs: list[str | list[int]] = (
            [given] if isinstance(given, str) or (given and type(given[0]) is int) else given
        )
        if not inputs:
            raise InvalidRequestError("input is an empty list; send at least one text", "input")
        return inputs

    def params(self) -> PoolingParams:
        if self.normalize is not None and self.use_activation not in (None, self.normalize):
            raise InvalidRequestError(
                "normalize and use_activation say different things; send one of them", "normalize"
            )
        normalize = self.use_activation if self.normalize is None else self.normalize
        return PoolingParams(task="embed", dimensions=self.dimensions, use_activation=normalize)


class ScoreRequest(PoolingBody):
    """Two texts, one and several, or as many as of the other (text_1 and text_2, or queries and documents)."""

    text_1: str | Strings | None = None
    text_2: str | Strings | None = None
    queries: str | Strings | None = None
    documents: str | Strings | None = None

    def pairs(self) -> list[tuple[str, str]]:
        """Raises InvalidRequestError unless the numbers of texts are 1:1, 1:N or N:N."""
        names = ("text_1", "text_2")
        if self.queries is not None or self.documents is not None:
            names = ("queries", "documents")
            if self.text_1 is not None or self.text_2 is not None:
                raise InvalidRequestError("send either text_1 and text_2, or queries and documents; not both", "text_1")
        for name in names:
            if getattr(self, name) is None:
                raise InvalidRequestError(f"{name} is missing", name, "missing_parameter")
        return make_pairs(getattr(self, names[0]), getattr(self, names[1]), names)


class RerankRequest(PoolingBody):
    """A query and the documents that are to be put into the order of their relevance."""

    neutral: ClassVar[Mapping[str, Neutral]] = {
        **PoolingBody.neutral,
        "rank_fields": Neutral((["text"],), "of a document that is an object, its text is read"),
        "max_tokens_per_doc": _CUT,
        "max_chunks_per_doc": _CUT,
    }

    query: str
    documents: Documents
    top_n: int | None = Field(None, description="Only the best so many; default, and 0: all.")
    return_documents: bool | None = Field(None, description="Whether the texts come back; default: they do.")

    def texts(self) -> list[str]:
        """Raises InvalidRequestError for a document without a text, or none at all."""
        if not self.documents:
            raise InvalidRequestError("documents is an empty list; send at least one", "documents")
        if self.top_n is not None and self.top_n < 0:
            raise InvalidRequestError(f"top_n must be 0 (all) or more; got {self.top_n}", "top_n")
        texts = []
        for index, document in enumerate(self.documents):
            text: Any = document.get("text") if isinstance(document, dict) else document
            if not isinstance(text, str):
                raise InvalidRequestError(
                    f'documents[{index}] has no text; documents are strings, or objects such as {{"text": "..."}}',
                    f"documents[{index}]",
                )
            texts.append(text)
        return texts


# --- answers ---------------------------------------------------------------------------------------------------------


class PoolingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, num_tokens: int) -> PoolingUsage:
        return cls(num_tokens, num_tokens)


class EmbeddingData(msgspec.Struct):
    """embedding: numbers, or base64 of them."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class ScoreData(msgspec.Struct):
    index: int
    score: float
    object: str = "score"


class PoolingAnswer(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Any]
    usage: PoolingUsage
    object: str = "list"


class RerankDocument(msgspec.Struct):
    text: str


class RerankResult(msgspec.Struct):
    index: int
    relevance_score: float
    document: RerankDocument | UnsetType = UNSET


class RerankAnswer(msgspec.Struct):
    id: str
    model: str
    usage: PoolingUsage
    results: list[RerankResult]
