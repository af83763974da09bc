"""Fields that clients of the OpenAI API or vLLM send and Shoal does not act on: which values change nothing.

Such a value is accepted; any other is refused, so that no setting is ignored silently. Null is "not given" everywhere.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from shoal.errors import InvalidRequestError


@dataclasses.dataclass(frozen=True)
class Neutral:
    """values: what changes nothing (`anything`: whatever it is). instead: what to do when another value is given."""

    values: tuple[Any, ...] = ()
    instead: str = "leave it out"
    anything: bool = False


_LABEL = Neutral(anything=True)
_STRUCTURED = Neutral(instead="structured output is not supported yet; leave it out and ask for the form in the prompt")
_BEAM = Neutral((False,), "beam search is not supported; leave it out, or take n answers")

COMMON_NEUTRAL: Mapping[str, Neutral] = {
    # Labels for the operator's books, and a hint: equal prompt beginnings are always reused.
    "user": _LABEL,
    "metadata": _LABEL,
    "safety_identifier": _LABEL,
    "prompt_cache_key": _LABEL,
    "store": Neutral((False,), "answers are not stored; leave it out or set it to false"),
    "service_tier": Neutral(("auto", "default"), 'there is one tier; leave it out or set it to "auto"'),
    "response_format": Neutral(({"type": "text"},), 'only {"type": "text"} is supported yet'),
    "structured_outputs": _STRUCTURED,
    "guided_json": _STRUCTURED,
    "guided_regex": _STRUCTURED,
    "guided_choice": _STRUCTURED,
    "guided_grammar": _STRUCTURED,
    "use_beam_search": _BEAM,
    "early_stopping": _BEAM,
    "length_penalty": Neutral((1, 1.0), "it belongs to beam search, which is not supported; leave it out"),
    "bad_words": Neutral(([],), "name single tokens in bad_words_token_ids instead (/tokenize finds their ids)"),
    "truncate_prompt_tokens": Neutral(instead="prompts are not cut; shorten it before it is sent"),
    "return_tokens_as_token_ids": Neutral((False,), "return_token_ids gives the ids in a list of their own"),
    "logits_processors": Neutral(([],)),
    "cache_salt": Neutral(instead="all requests share one prefix cache; --no-enable-prefix-caching turns it off"),
    "kv_transfer_params": Neutral(),
    "vllm_xargs": Neutral(({},)),
}

_NO_TOOLS = "tools are not supported yet; leave it out and describe them in the prompt"

CHAT_NEUTRAL: Mapping[str, Neutral] = {
    **COMMON_NEUTRAL,
    "tools": Neutral(([],), _NO_TOOLS),
    "functions": Neutral(([],), _NO_TOOLS),
    # Without tools there is nothing to choose.
    "tool_choice": Neutral(("none", "auto"), _NO_TOOLS),
    "function_call": Neutral(("none", "auto"), _NO_TOOLS),
    "parallel_tool_calls": Neutral((True, False)),
    "modalities": Neutral((["text"],), 'answers are text; leave it out or set it to ["text"]'),
    "audio": Neutral(instead="answers are text; leave it out"),
    "prediction": Neutral(instead="predicted outputs are not supported; leave it out"),
    "reasoning_effort": Neutral(instead="what the chat template understands goes into chat_template_kwargs"),
    "include_reasoning": Neutral((True,), "reasoning is part of the text; leave it out"),
    "verbosity": Neutral(instead="ask for it in the prompt"),
    "web_search_options": Neutral(instead="there is no web search; leave it out"),
    "echo": Neutral((False,), "/v1/completions has echo"),
    "documents": Neutral(([],), "put documents into the messages, or into chat_template_kwargs"),
    "mm_processor_kwargs": Neutral(({},), "this model reads text only; leave it out"),
}


def check_extra_fields(extra: Mapping[str, Any] | None, known: Iterable[str], neutral: Mapping[str, Neutral]) -> None:
    """Raise InvalidRequestError for the first field that is neither declared nor neutral.

    extra: the fields of the body that its model does not declare; known: those that it does.
    """
    for name, value in (extra or {}).items():
        rule = neutral.get(name)
        if rule is None:
            raise InvalidRequestError(_unknown(name, [*known, *neutral]), name, "unknown_parameter")
        if value is None or rule.anything or any(_same(value, accepted) for accepted in rule.values):
            continue
        raise InvalidRequestError(f"{name} is not supported: {rule.instead}", name, "unsupported_parameter")


def _same(value: Any, accepted: Any) -> bool:
    return value == accepted and isinstance(value, bool) == isinstance(accepted, bool)


def _unknown(name: str, candidates: list[str]) -> str:
    near = difflib.get_close_matches(name, candidates, n=1)
    hint = f"did you mean {near[0]}?" if near else "leave it out (/docs lists all fields)"
    return f"the body has the field {name[:100]!r}, which is not known here; {hint}"
