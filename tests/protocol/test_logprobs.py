"""Log-probabilities in the API's shapes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.logprobs import CompletionLogprobsBuilder, prompt_logprobs
from shoal.protocol.whole import token_logprobs
from shoal.types import Logprob, TokenLogprobs
from tests.protocol.test_chunks import builder, token_bytes


def entry(*token_ids: int) -> TokenLogprobs:
    return TokenLogprobs(list(token_ids), [-float(i) for i in range(len(token_ids))], 1)


def test_offsets_count_whole_characters_of_the_shown_text() -> None:
    lists = builder()
    lists.add([entry(1), entry(3), entry(4), entry(5), entry(2), entry(1)])
    found = lists.take()
    assert found.tokens == ["a", "bytes:\\xe4\\xbd", "bytes:\\xa0", "<|end|>", "é", "a"]
    assert found.text_offset == [0, 1, 1, 2, 2, 3]
    lists.add([entry(1)])
    assert lists.take().text_offset == [4]


def test_parts_of_characters_do_not_hide_each_other() -> None:
    lists = CompletionLogprobsBuilder(token_bytes, lambda _: True, 2)
    lists.add([TokenLogprobs([3, 4, 6], [-1.0, -2.0, -3.0], 1)])
    assert lists.take().top_logprobs == [{"bytes:\\xa0": -2.0, "bytes:\\x80": -3.0, "bytes:\\xe4\\xbd": -1.0}]


def test_prompt_logprobs_keep_their_shape_and_have_no_infinity() -> None:
    found = prompt_logprobs([None, {3: Logprob(float("-inf"), 9, "x")}])
    assert found[0] is None
    assert found[1] is not None and found[1][3].logprob == -9999.0


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6, unique=True), st.integers(0, 5), st.integers(0, 50))
def test_entries_survive_the_dict_of_a_request_output(top_ids: list[int], num_top: int, chosen: int) -> None:
    """A RequestOutput keeps a dict in which the token itself stands once; what the engine had comes back from it."""
    top = [(token_id, -0.5 * (i + 1)) for i, token_id in enumerate(top_ids[:num_top])]
    num_top = len(top)
    rank = next((i + 1 for i, (id_, _) in enumerate(top) if id_ == chosen), num_top + 1)
    logprob = -0.5 * rank
    as_dict = {chosen: Logprob(logprob, rank)}
    for i, (id_, value) in enumerate(top):
        as_dict.setdefault(id_, Logprob(value, i + 1))
    expected = TokenLogprobs([chosen, *(id_ for id_, _ in top)], [logprob, *(value for _, value in top)], rank)
    assert token_logprobs(as_dict, num_top) == expected
