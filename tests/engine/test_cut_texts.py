"""Texts and pairs that are cut, against what Hugging Face's tokenizers do with truncation."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.tokenizer import Tokenizer
from shoal.errors import InvalidRequestError
from tests.checkpoints import byte_level_tokenizer
from tests.pooling_checkpoints import segmented_tokenizer

words = st.lists(st.sampled_from(["fox", "dog", "你好", "7", "x y"]), max_size=12).map(" ".join)


def wanted(backend: object, text: str, pair: str | None, most: int | None) -> tuple[list[int], int]:
    options = {} if most is None else {"truncation": True, "max_length": most}
    encoded = copy.deepcopy(backend)(text, pair, return_token_type_ids=True, **options)  # type: ignore[operator]
    types = encoded["token_type_ids"]
    return encoded["input_ids"], types.index(1) if 1 in types else len(types)


@settings(max_examples=150, deadline=None)
@given(text=words, pair=st.one_of(st.none(), words.filter(bool)), most=st.one_of(st.none(), st.integers(4, 40)))
def test_as_hugging_face_cuts(text: str, pair: str | None, most: int | None) -> None:
    for backend in (segmented_tokenizer(True), byte_level_tokenizer()):
        tokenizer = Tokenizer(copy.deepcopy(backend))
        assert tokenizer.encode_cut(text, pair, most) == wanted(backend, text, pair, most)
        assert tokenizer.encode(text) == wanted(backend, text, None, None)[0]  # nothing of it stays


def test_text_that_is_none() -> None:
    with pytest.raises(InvalidRequestError, match="cannot be tokenized"):
        Tokenizer(copy.deepcopy(byte_level_tokenizer())).encode_cut("\ud800", None, 5)
