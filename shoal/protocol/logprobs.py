"""Log-probabilities in the API's shapes. Made of TokenLogprobs, with one function that knows the tokens' bytes."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence

from shoal.protocol.responses import ChatLogprob, CompletionLogprobs, PromptLogprob, PromptLogprobs, TopLogprob
from shoal.types.outputs import Logprob, TokenLogprobs

TokenBytes = Callable[[int], bytes]
# JSON has no infinity: what a token that cannot be chosen is given instead (as in the OpenAI API).
_LOWEST = -9999.0


def chat_logprobs(entries: Iterable[TokenLogprobs], token_bytes: TokenBytes) -> list[ChatLogprob]:
    """One entry per token: the chosen one, then the likeliest ones."""
    result = []
    for entry in entries:
        chosen, *top = [
            TopLogprob(_text(data), _finite(logprob), list(data))
            for data, logprob in zip(map(token_bytes, entry.token_ids), entry.logprobs, strict=True)
        ]
        result.append(ChatLogprob(chosen.token, chosen.logprob, chosen.bytes, top))
    return result


def prompt_logprobs(entries: Sequence[Mapping[int, Logprob] | None]) -> PromptLogprobs:
    """vLLM's shape: a dict by token id for each position of the prompt, None for the first."""

    def shown(entry: Mapping[int, Logprob]) -> dict[int, PromptLogprob]:
        return {id_: PromptLogprob(_finite(one.logprob), one.rank, one.decoded_token) for id_, one in entry.items()}

    return [None if entry is None else shown(entry) for entry in entries]


class CompletionLogprobsBuilder:
    """Adds tokens of one answer to the parallel lists of the completions API.

    top_logprobs has the `num_top` likeliest tokens and the chosen one (as in the OpenAI API). shows: whether a token's
    text is part of the answer's (special tokens usually are not).
    """

    def __init__(self, token_bytes: TokenBytes, shows: Callable[[int], bool], num_top: int) -> None:
        self._token_bytes = token_bytes
        self._shows = shows
        self._num_top = num_top
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.lists = CompletionLogprobs([], [], [], [])

    def add_prompt(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], text: str) -> None:
        """The echoed prompt; the first token has no log-probability. The answer's offsets begin after `text`."""
        for token_id, entry in zip(token_ids, entries, strict=True):
            self._add(token_id, entry)
        self._offset = len(text)
        self._decoder.reset()

    def add(self, entries: Iterable[TokenLogprobs]) -> None:
        for entry in entries:
            self._add(entry.token_ids[0], entry)

    def take(self) -> CompletionLogprobs:
        """The lists since the last call."""
        lists, self.lists = self.lists, CompletionLogprobs([], [], [], [])
        return lists

    def _add(self, token_id: int, entry: TokenLogprobs | None) -> None:
        data = self._token_bytes(token_id)
        self.lists.tokens.append(_spelt(data))
        self.lists.text_offset.append(self._offset)
        if self._shows(token_id):
            self._offset += len(self._decoder.decode(data))
        if entry is None:
            self.lists.token_logprobs.append(None)
            self.lists.top_logprobs.append(None)
            return
        logprobs = [_finite(logprob) for logprob in entry.logprobs]
        self.lists.token_logprobs.append(logprobs[0])
        top: dict[str, float] = {}
        for other, logprob in zip(entry.token_ids[1 : self._num_top + 1], logprobs[1:], strict=False):
            top.setdefault(_spelt(self._token_bytes(other)), logprob)
        top.setdefault(_spelt(data), logprobs[0])
        self.lists.top_logprobs.append(top)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _spelt(data: bytes) -> str:
    """The token's text; a part of a character as its bytes, so that two of them do not look the same."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST
