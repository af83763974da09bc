"""`shoal chat`: a conversation with a server in the terminal, streamed."""

from __future__ import annotations

import contextlib
import sys

from shoal.cli.api_client import ApiClient
from shoal.cli.client_options import ChatOptions, ConnectionOptions, SamplingOptions
from shoal.cli.command import Command
from shoal.errors import ShoalError, UnavailableError

_HELP = "/clear forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"


def pick_model(client: ApiClient, wanted: str | None) -> str:
    """The model named, else the first that the server names."""
    names = client.models()
    if wanted is not None:
        return wanted
    if not names:
        raise UnavailableError(f"{client.url} serves no model")
    return names[0]


class Conversation:
    """The messages so far, and the server that continues them."""

    def __init__(self, client: ApiClient, model: str, system_prompt: str | None, sampling: SamplingOptions) -> None:
        self._client = client
        self._model = model
        self._parameters = sampling.parameters()
        self._opening = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.messages = list(self._opening)

    def clear(self) -> None:
        self.messages = list(self._opening)

    def ask(self, text: str) -> None:
        """Print the answer as it comes. A question without an answer, by error or Ctrl-C, leaves no trace."""
        question = {"role": "user", "content": text}
        pieces: list[str] = []
        stream = self._client.stream_chat(self._model, [*self.messages, question], **self._parameters)
        with contextlib.closing(stream):  # type: ignore[type-var]
            for piece in stream:
                pieces.append(piece)
                print(piece, end="", flush=True)
        print()
        self.messages += [question, {"role": "assistant", "content": "".join(pieces)}]


def _run(connection: ConnectionOptions, sampling: SamplingOptions, chat: ChatOptions) -> int:
    with ApiClient(connection.url, connection.api_key) as client:
        model = pick_model(client, connection.model_name)
        conversation = Conversation(client, model, chat.system_prompt, sampling)
        if chat.quick is not None:
            conversation.ask(chat.quick)
            return 0
        if sys.stdin.isatty():
            print(f"{model} at {client.url}; {_HELP}", file=sys.stderr)
            with contextlib.suppress(ImportError):  # arrow keys and history for input()
                import readline  # noqa: F401
        return _converse(conversation)


def _converse(conversation: Conversation) -> int:
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(prompt).strip()
        except EOFError:
            return 0
        if text in ("/exit", "/quit"):
            return 0
        if text == "/clear":
            conversation.clear()
        elif text.startswith("/"):
            print(_HELP, file=sys.stderr)
        elif text:
            try:
                conversation.ask(text)
            except KeyboardInterrupt:
                print(" (stopped)", file=sys.stderr)
            except ShoalError as error:
                if not sys.stdin.isatty():
                    raise
                print(f"shoal: error: {error}", file=sys.stderr)


COMMAND = Command(
    name="chat",
    description=f"Talk to a running server. {_HELP}.",
    sections=(ConnectionOptions, SamplingOptions, ChatOptions),
    run=_run,
)
