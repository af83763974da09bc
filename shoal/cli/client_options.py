"""Options of the commands that talk to a server."""

from __future__ import annotations

import dataclasses
from typing import Any

from shoal.config.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectionOptions:
    """The server."""

    url: str = option("http://127.0.0.1:8000", "Address of the server, with or without /v1.")
    model_name: str | None = option(None, "Model to ask; default: the first that the server names.", aliases=("model",))
    api_key: str | None = option(None, "Key to present, where the server asks for one.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen; what is not given is left to the server."""

    temperature: float | None = option(None, "0 is greedy; higher is more varied.", minimum=0)
    top_p: float | None = option(None, "Share of the probability that may be chosen from.", minimum=0, maximum=1)
    max_tokens: int | None = option(None, "Longest answer, in tokens.", minimum=1)
    seed: int | None = option(None, "The same seed gives the same answer.")
    stop: list[str] = option([], "Strings that end the answer.")

    def parameters(self) -> dict[str, Any]:
        """What was given, as fields of a request."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, [])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The conversation."""

    system_prompt: str | None = option(None, "What the model is told before the conversation.")
    quick: str | None = option(None, "Ask this one question and leave.", short="q")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompleteOptions:
    """The prompt."""

    prompt: str | None = option(
        None, "Text to continue; default: what comes in on standard input.", aliases=("quick",), short="q"
    )
    echo: bool = option(False, "Print the prompt before its continuation.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The demonstration."""

    once: bool = option(False, "End after the answer instead of serving on.")
    question: str = option("给我推荐中国适合旅游的地方", "What the model is asked.")
    model: str = option("shoal-tiny", "The model to serve.")
    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; when it is taken, any free one.", minimum=0, maximum=65535)
    max_tokens: int = option(256, "Longest answer, in tokens.", minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectEnvOptions:
    """The report."""

    json: bool = option(False, "Print JSON instead of lines.")


CLIENT_SECTIONS = (ConnectionOptions, SamplingOptions, ChatOptions, CompleteOptions, DemoOptions, CollectEnvOptions)
