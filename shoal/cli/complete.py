"""`shoal complete`: one prompt to a server, its continuation streamed to standard output."""

from __future__ import annotations

import sys

from shoal.cli.api_client import ApiClient
from shoal.cli.chat import pick_model
from shoal.cli.client_options import CompleteOptions, ConnectionOptions, SamplingOptions
from shoal.cli.command import Command
from shoal.errors import ConfigError


def _run(connection: ConnectionOptions, sampling: SamplingOptions, complete: CompleteOptions) -> int:
    prompt = complete.prompt
    if prompt is None:
        if sys.stdin.isatty():
            raise ConfigError("complete needs a prompt: shoal complete 'Once upon a time', or text on standard input")
        prompt = sys.stdin.read().rstrip("\n")
    with ApiClient(connection.url, connection.api_key) as client:
        model = pick_model(client, connection.model_name)
        if complete.echo:
            print(prompt, end="", flush=True)
        for piece in client.stream_completion(model, prompt, **sampling.parameters()):
            print(piece, end="", flush=True)
    print()
    return 0


COMMAND = Command(
    name="complete",
    description="Let a running server continue one prompt.",
    sections=(ConnectionOptions, SamplingOptions, CompleteOptions),
    positional="prompt",
    run=_run,
)
