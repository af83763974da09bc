"""ServerState: what all routes share. Made once by create_app."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping
from typing import Any

from shoal.config.options import ModelOptions, ServerOptions
from shoal.engine.async_engine import AsyncEngine
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import ConfigError, InvalidRequestError, NotFoundError
from shoal.observability.metrics import EngineMetrics
from shoal.protocol.logprobs import CompletionLogprobsBuilder


@dataclasses.dataclass
class ServerState:
    """The engine and how it is shown.

    model_names: what clients may call the model; the first one is the answer to "which model?".
    template: the Jinja text of the chat template, empty where there is none.
    """

    engine: AsyncEngine
    options: ServerOptions
    model_names: list[str]
    metrics: EngineMetrics
    model_defaults: Mapping[str, Any]
    facts: Mapping[str, Any]
    template: str
    started: int = dataclasses.field(default_factory=lambda: int(time.time()))
    _counter: itertools.count[int] = dataclasses.field(default_factory=itertools.count)

    @classmethod
    def make(
        cls,
        engine: AsyncEngine,
        options: ServerOptions,
        model: ModelOptions,
        metrics: EngineMetrics | None,
        facts: Mapping[str, Any] | None,
        chat_template: str | None,
    ) -> ServerState:
        names = served_names(options, model)
        defaults = engine.config.model.generation_defaults if model.generation_config == "auto" else {}
        own_template = "" if engine.tokenizer is None else engine.tokenizer.backend.chat_template
        return cls(
            engine=engine,
            options=options,
            model_names=names,
            metrics=metrics or EngineMetrics(names[0], options.metrics_prefix),
            model_defaults=defaults,
            facts=facts or {},
            template=str(chat_template or own_template or ""),
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises InvalidRequestError where the engine runs without one."""
        if self.engine.tokenizer is None:
            raise InvalidRequestError(
                "this server runs without a tokenizer (--skip-tokenizer-init); send token ids to /v1/completions"
            )
        return self.engine.tokenizer

    def model_name(self, wanted: str | None) -> str:
        """The name to answer under. Raises NotFoundError for a name that is not served."""
        if wanted is None:
            return self.model_names[0]
        if wanted not in self.model_names and self.engine.adapters.find(wanted) is None:
            names = [*self.model_names, *self.engine.adapters.names]
            raise NotFoundError(
                f"the model {wanted[:200]!r} is not served here; there is {', '.join(names)}",
                "model",
                "model_not_found",
            )
        return wanted

    def request_template(self, template: str | None) -> str | None:
        """A request's own chat template. Raises InvalidRequestError unless the operator trusts those: a template is a
        program, and one line of it can take all memory."""
        if template is not None and not self.options.trust_request_chat_template:
            raise InvalidRequestError(
                "chat_template is not taken from requests here; the server's --trust-request-chat-template allows it",
                "chat_template",
            )
        return template

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token's text; without a tokenizer its number."""
        if self.engine.tokenizer is None:
            return b"token_id:%d" % token_id
        return self.engine.tokenizer.token_bytes(token_id)

    def logprobs_builder(self, num_top: int, skip_special_tokens: bool) -> CompletionLogprobsBuilder:
        tokenizer = self.engine.tokenizer
        special = tokenizer.special_token_ids if tokenizer is not None and skip_special_tokens else frozenset()
        return CompletionLogprobsBuilder(self.token_bytes, lambda token_id: token_id not in special, num_top)

    def answer_ids(self, request_id: str, prefix: str) -> tuple[str, str]:
        """The id in the answer, made of the request's, and one for the engine that no other request has."""
        shown = f"{prefix}-{request_id}"
        return shown, f"{shown}-{next(self._counter)}"


def served_names(options: ServerOptions, model: ModelOptions) -> list[str]:
    """The names of the model in the API. Raises ConfigError for an empty one."""
    if not all(name.strip() for name in options.served_model_name):
        raise ConfigError(f"--served-model-name must not be empty; got {options.served_model_name}")
    return list(options.served_model_name) or [model.model]
