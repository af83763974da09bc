"""Prompts for `shoal bench serve`: random, with shared beginnings, or out of a JSONL file."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.benchmark.workload import Range, random_ids
from shoal.errors import ConfigError

# Common words, each one token (with its space) in most vocabularies.
_WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system",
    "program", "question", "work", "night", "point", "home", "water", "room", "mother", "area", "money", "story",
    "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business", "issue", "side", "kind",
    "head", "house", "service", "friend", "father", "power", "hour",
)  # fmt: skip
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ServeRequest:
    """One request: a prompt (text or token ids) or a conversation. num_output: its max_tokens; None: the server's."""

    prompt: str | list[int] | None = None
    messages: list[Message] | None = None
    num_output: int | None = None


@dataclasses.dataclass(frozen=True)
class RandomPrompts:
    """Prompts of `prompt_tokens` random ids below `vocab_size`, or as many words of text, for answers of a length.

    num_prefixes: each prompt begins with one of so many beginnings of `prefix_tokens`; 0: nothing is shared.
    """

    prompt_tokens: Range
    output_tokens: Range
    as_text: bool = False
    vocab_size: int = 2000
    num_prefixes: int = 0
    prefix_tokens: int = 0

    def draw(self, num_requests: int, seed: int) -> list[ServeRequest]:
        """The same for the same seed. Beginnings take turns, so each is met about equally often."""
        generator = random.Random(seed)
        prefixes = [self._tokens(generator, self.prefix_tokens) for _ in range(self.num_prefixes)] or [[]]
        requests = []
        for index in range(num_requests):
            tokens = prefixes[index % len(prefixes)] + self._tokens(generator, generator.randint(*self.prompt_tokens))
            prompt: str | list[int] = " ".join(_WORDS[token] for token in tokens) if self.as_text else tokens
            requests.append(ServeRequest(prompt=prompt, num_output=generator.randint(*self.output_tokens)))
        return requests

    def _tokens(self, generator: random.Random, num_tokens: int) -> list[int]:
        """Ids of tokens, or of words."""
        if self.as_text:
            return [generator.randrange(len(_WORDS)) for _ in range(num_tokens)]
        return random_ids(generator, num_tokens, self.vocab_size)


def read_requests(path: str, num_output: int | None) -> list[ServeRequest]:
    """One request a line: a JSON string, or an object with `prompt` (text or ids), `messages` (OpenAI) or
    `conversations` (ShareGPT), and perhaps `max_tokens`, which counts more than `num_output`.

    Answers at the end of a conversation are cut off: they are what is asked for. Raises ConfigError with the line.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file {path} cannot be read: {error}") from error
    requests = [
        _read_line(line, f"{path}:{number}", num_output) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not requests:
        raise ConfigError(f"--file {path} is empty; it must have a JSON object in each line, with prompt or messages")
    return requests


def _read_line(line: str, where: str, num_output: int | None) -> ServeRequest:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
    entry = {"prompt": found} if isinstance(found, str) else found
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} must be a JSON object or a string; got {line[:60]!r}")
    wanted = entry.get("max_tokens", num_output)
    if wanted is not None and (type(wanted) is not int or wanted < 1):
        raise ConfigError(f"{where}: max_tokens must be an integer, 1 or more; got {wanted!r}")
    prompt = entry.get("prompt")
    if _is_prompt(prompt):
        return ServeRequest(prompt=prompt, num_output=wanted)
    messages = _messages(entry)
    if messages:
        return ServeRequest(messages=messages, num_output=wanted)
    raise ConfigError(
        f"{where} has no prompt (text or token ids), messages (OpenAI) or conversations (ShareGPT) that ask something; "
        f"it has {', '.join(map(str, entry)) or 'nothing'}"
    )


def _is_prompt(prompt: Any) -> bool:
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    return bool(prompt) and (isinstance(prompt, str) or is_ids)


def _messages(entry: dict[str, Any]) -> list[Message]:
    """OpenAI messages up to the last that is not the assistant's; [] for what are none."""
    found = entry.get("messages")
    if found is None:
        turns = entry.get("conversations")
        turns = turns if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns) else []
        found = [{"role": _ROLES.get(turn.get("from", "")), "content": turn.get("value")} for turn in turns]
    if not isinstance(found, list) or not all(isinstance(one, dict) and one.get("role") for one in found):
        return []
    messages = list(found)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


def take(requests: Sequence[ServeRequest], num_requests: int | None) -> list[ServeRequest]:
    """As many as wanted, from the start again where there are fewer; None: each once."""
    count = num_requests or len(requests)
    return [requests[index % len(requests)] for index in range(count)]
