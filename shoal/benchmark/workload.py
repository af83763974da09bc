"""What a benchmark asks of an engine: how many requests, how long. Random, but the same for the same seed."""

from __future__ import annotations

import dataclasses
import random
import re

from shoal.errors import ConfigError

Range = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Workload:
    """`num_requests` requests of token ids; lengths in tokens, drawn evenly from ranges that include both ends."""

    num_requests: int
    prompt_tokens: Range
    output_tokens: Range
    temperature: float = 0.0

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence it may ask for."""
        return self.prompt_tokens[1] + self.output_tokens[1]

    def __str__(self) -> str:
        lengths = f"{show_range(self.prompt_tokens)} · {show_range(self.output_tokens)}"
        return f"{self.num_requests} · {lengths}, temperature {self.temperature:g}"


@dataclasses.dataclass(frozen=True)
class TokenRequest:
    """A prompt of token ids, and how many tokens are wanted after it."""

    prompt: list[int]
    num_output: int


def draw_requests(workload: Workload, vocab_size: int, seed: int) -> list[TokenRequest]:
    """The requests of a workload. The first two ids, where special tokens often lie, are not used."""
    generator = random.Random(seed)
    lengths = [
        (generator.randint(*workload.prompt_tokens), generator.randint(*workload.output_tokens))
        for _ in range(workload.num_requests)
    ]
    return [
        TokenRequest(random_ids(generator, num_prompt, vocab_size), num_output) for num_prompt, num_output in lengths
    ]


def random_ids(generator: random.Random, num_tokens: int, vocab_size: int) -> list[int]:
    """Token ids from 2 to `vocab_size` - 1."""
    return [generator.randrange(2, vocab_size) for _ in range(num_tokens)]


def parse_range(text: str, source: str) -> Range:
    """ "128" or "100-1024", in tokens. Raises ConfigError that begins with `source`."""
    match = re.fullmatch(r"(\d+)(?:[-–](\d+))?", text.strip())
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise ConfigError(f"{source} must be a number of tokens or a range, such as 128 or 100-1024; got {text!r}")
    return low, high


def show_range(bounds: Range) -> str:
    """The text that `parse_range` reads."""
    low, high = bounds
    return str(low) if low == high else f"{low}-{high}"
