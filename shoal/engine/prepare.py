"""Turns what a client sends into what the engine takes: renders, tokenizes, validates, resolves the parameters.

Called by AsyncEngine.prepare and prepare_chat. Nothing is queued here and nothing waits.
"""

from __future__ import annotations

import dataclasses
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.config.engine_config import EngineConfig
from shoal.engine.answer_so_far import AnswerSoFar
from shoal.engine.journal import DEFAULT_DEADLINE_SECONDS, RequestJournal
from shoal.engine.pooling import check_pooling, what_it_does
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import InvalidRequestError
from shoal.protocol.errors import NOT_THIS_KIND
from shoal.types.adapter import AdapterRef
from shoal.types.pooling_params import PoolingParams
from shoal.types.quoted import quoted
from shoal.types.sampling_params import SamplingParams
from shoal.types.seeds import derive_seed
from shoal.types.token_ids import validate_token_ids

# "text", token ids, {"prompt": "text"} or {"prompt_token_ids": [ids]}
Prompt = str | Sequence[int] | dict[str, Any]
# Of a request for text, or for a vector or scores.
Params = SamplingParams | PoolingParams


@dataclasses.dataclass(slots=True)
class PreparedRequest:
    """A valid request, not queued yet.

    prompt: the text where there was one. params: resolved (seed drawn, max_tokens set, end tokens known).
    stop_token_strings: stop strings that are special tokens, by token id. arrival_time: time.time().
    begun: of a continuation, the answers of which a part was delivered elsewhere. num_crashes: how many engines ended
    while they worked on it. deadline_seconds: how long it may go without progress. alone: no other request may run
    beside it. held: it waits here for the engine's restart when that is lost, instead of ending as `lost`.
    pooling: of a request for a vector or scores; `params` chooses nothing then. adapter: LoRA, of one that names it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int
    arrival_time: float
    stop_token_strings: dict[int, str]
    begun: Mapping[int, AnswerSoFar] = dataclasses.field(default_factory=dict)
    num_crashes: int = 0
    deadline_seconds: float = DEFAULT_DEADLINE_SECONDS
    alone: bool = False
    held: bool = True
    pooling: PoolingParams | None = None
    adapter: AdapterRef | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    def journal(self, index: int) -> RequestJournal:
        """The journal of answer `index`, which draws from a seed of its own."""
        assert self.params.seed is not None, "prepare draws a seed"
        begun = self.begun.get(index, AnswerSoFar())
        changes: dict[str, Any] = {"n": 1, "seed": derive_seed(self.params.seed, index)}
        if index > 0 or begun.prompt_logprobs is not None:
            changes["prompt_logprobs"] = None  # the same for every answer: computed once
        return RequestJournal(
            request_id=f"{self.request_id}-{index}",
            prompt_token_ids=self.prompt_token_ids,
            sampling=self.params.clone(**changes),
            stop_token_strings=self.stop_token_strings,
            priority=self.priority,
            arrival_time=self.arrival_time,
            emitted_token_ids=list(begun.token_ids),
            delivered_characters=begun.num_characters,
            delivered_tokens=len(begun.token_ids),
            deadline_seconds=self.deadline_seconds,
            pooling=self.pooling,
            adapter=self.adapter,
        )

    def carry_on(self, begun: Mapping[int, AnswerSoFar], vocab_size: int, *, first_index: int = 0) -> None:
        """Let the answers go on where others left them.

        first_index: what errors call answer 0. Raises InvalidRequestError for what can be none of these answers; that
        the text fits the ids is found out by whoever replays them.
        """
        for index, answer in begun.items():
            if not 0 <= index < self.params.n:
                raise InvalidRequestError(f"the journal has an answer {index}; the request has {self.params.n}")
            answer.check(f"answer {first_index + index}", index, self.params, self.num_prompt_tokens, vocab_size)
        self.begun = begun


class RequestPreparer:
    """Knows the model's limits: vocabulary, length, end tokens."""

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer | None, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._model = config.model
        self._vocab_size = config.model.vocab_size
        end_tokens = set(config.model.eos_token_ids)
        if tokenizer is not None:
            end_tokens |= tokenizer.end_token_ids
        self._end_token_ids = sorted(id_ for id_ in end_tokens if 0 <= id_ < self._vocab_size)
        # Seeds of requests that bring none: the same for the same --seed and order of requests.
        self._seeds = random.Random(config.seed)

    def prepare(
        self,
        prompt: Prompt,
        params: Params,
        *,
        request_id: str | None,
        priority: int,
        add_special_tokens: bool,
        adapter: AdapterRef | None = None,
    ) -> PreparedRequest:
        """Validate and resolve. Raises InvalidRequestError, saying what was found and what would work."""
        pooling: PoolingParams | None = None
        if isinstance(params, PoolingParams):
            pooling = check_pooling(params, self._model)
            params = SamplingParams(max_tokens=1, detokenize=False, seed=0)
        else:
            self._check_generates()
        if type(priority) is not int or abs(priority) >= 2**63:
            raise InvalidRequestError(
                f"priority must be an integer of at most 63 bits; got {quoted(priority, 50)}", "priority"
            )
        text, token_ids = self._tokenize(prompt, add_special_tokens)
        self._check_prompt(token_ids, num_output=1 if pooling is None else 0)
        stop_token_strings: dict[int, str] = {}
        if pooling is None:
            params, stop_token_strings = self._resolve(params, len(token_ids))
        return PreparedRequest(
            request_id=request_id or f"request-{uuid.uuid4().hex}",
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            priority=priority,
            arrival_time=time.time(),
            stop_token_strings=stop_token_strings,
            pooling=pooling,
            adapter=adapter,
        )

    def _check_generates(self) -> None:
        if self._model.pooling is not None:
            raise InvalidRequestError(what_it_does(self._model.pooling), "model", NOT_THIS_KIND)

    def chat_tokenizer(self) -> Tokenizer:
        """The tokenizer for chats. Raises InvalidRequestError where there is none, or the model makes no text."""
        self._check_generates()
        return self.require_tokenizer("a chat")

    def require_tokenizer(self, what_for: str) -> Tokenizer:
        """The tokenizer, or InvalidRequestError: this engine runs without one."""
        if self._tokenizer is None:
            raise InvalidRequestError(
                f"{what_for} needs a tokenizer, and this engine was started without one (skip_tokenizer_init); "
                "send token ids, or start it with a tokenizer"
            )
        return self._tokenizer

    def _tokenize(self, prompt: Prompt, add_special_tokens: bool) -> tuple[str | None, list[int]]:
        text: Any = None
        if isinstance(prompt, dict):
            text = prompt.get("prompt")
            prompt = self._prompt_of(prompt)
        if isinstance(prompt, str):
            tokenizer = self.require_tokenizer("a text prompt")
            return prompt, tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        if isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
            return text, [*prompt]
        raise InvalidRequestError(
            'prompt must be a string, a list of token ids, {"prompt": ...} or {"prompt_token_ids": [...]}; '
            f"got {type(prompt).__name__}",
            "prompt",
        )

    @staticmethod
    def _prompt_of(prompt: dict[str, Any]) -> str | Sequence[int]:
        found: Any = prompt.get("prompt_token_ids")
        if found is None:
            found = prompt.get("prompt")
        unknown = set(prompt) - {"prompt", "prompt_token_ids"}
        if found is None or unknown:
            raise InvalidRequestError(
                'a prompt given as a dict has "prompt" (text) or "prompt_token_ids" (a list); got the keys '
                + (", ".join(map(repr, prompt)) or "none"),
                "prompt",
            )
        return found  # type: ignore[no-any-return]

    def _check_prompt(self, token_ids: list[int], num_output: int) -> None:
        """num_output: tokens of the answer that must fit behind the prompt."""
        if not token_ids:
            raise InvalidRequestError("the prompt is empty; send at least one token", "prompt")
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < self._vocab_size:
                raise InvalidRequestError(
                    f"the prompt holds {quoted(token_id, 50)}, which is not a token id of this model "
                    f"(integers from 0 to {self._vocab_size - 1})",
                    "prompt",
                )
        most = self._max_model_len - num_output
        if len(token_ids) > most:
            raise InvalidRequestError(
                f"the prompt has {len(token_ids)} tokens; this model takes {self._max_model_len} with the answer "
                f"(max_model_len), so a prompt of at most {most}"
                if num_output
                else f"the text has {len(token_ids)} tokens; this model takes {most} (max_model_len); "
                "truncate_prompt_tokens cuts it",
                "prompt",
                "context_length_exceeded",
            )

    def _resolve(self, params: SamplingParams, num_prompt_tokens: int) -> tuple[SamplingParams, dict[int, str]]:
        room = self._max_model_len - num_prompt_tokens
        if params.min_tokens > room:
            raise InvalidRequestError(
                f"min_tokens is {params.min_tokens}, but after a prompt of {num_prompt_tokens} tokens only {room} fit "
                f"in max_model_len ({self._max_model_len})",
                "min_tokens",
            )
        if params.stop_strings and not params.detokenize:
            raise InvalidRequestError("stop strings are found in text; they need detokenize=True", "stop")
        if params.stop_strings:
            self.require_tokenizer("a stop string")
        stop_token_strings = self._special_stop_tokens(params.stop_strings)
        params = params.clone(
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            detokenize=params.detokenize and self._tokenizer is not None,
            stop_token_ids=sorted({*(params.stop_token_ids or ()), *stop_token_strings}) or None,
            eos_token_ids=[] if params.ignore_eos else list(self._end_token_ids),
        )
        validate_token_ids(params, self._vocab_size)
        return params, stop_token_strings

    def _special_stop_tokens(self, strings: list[str]) -> dict[int, str]:
        """Stop strings that are special tokens: their text is usually skipped, so their ids must stop the engine."""
        if self._tokenizer is None:
            return {}
        found = ((self._tokenizer.special_token_id(string), string) for string in strings)
        return {id_: string for id_, string in found if id_ is not None and id_ < self._vocab_size}
