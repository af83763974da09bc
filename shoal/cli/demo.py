"""`shoal demo`: a server on the embedded model, one question to it, and an address to go on with."""

from __future__ import annotations

import collections
import contextlib
import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape

from shoal import env
from shoal.cli.api_client import ApiClient
from shoal.cli.client_options import DemoOptions
from shoal.cli.command import Command
from shoal.errors import EngineError, StartupError
from shoal.network import format_url, listen_preferably, port_of

_STOP_SECONDS = 45.0  # the server's own --shutdown-timeout is 30

_console = Console(stderr=True, highlight=False)


class _Server:
    """`shoal serve` in a process of its own. What it logs is kept while we wait and ask, and shown afterwards."""

    def __init__(self, command: Sequence[str]) -> None:
        # A session of its own: Ctrl-C reaches us alone, and we stop the server once and in order.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=env.subprocess_environment(),
            start_new_session=True,
        )
        self.lines: collections.deque[str] = collections.deque(maxlen=200)
        self._show = False
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, name="server-log", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._lock:
                self.lines.append(line.rstrip("\n"))
                if self._show:
                    print(line, end="", file=sys.stderr, flush=True)

    def show_log(self, *, past: bool = False) -> None:
        """From now on the log goes to stderr; `past`: what was kept so far too."""
        with self._lock:
            if past and self.lines:
                print("\n".join(self.lines), file=sys.stderr, flush=True)
            self._show = True

    def hide_log(self) -> None:
        with self._lock:
            self._show = False

    def raise_if_ended(self) -> None:
        code = self.process.poll()
        if code is not None:
            self._reader.join(timeout=5)
            # What is already on the screen is not repeated.
            self.show_log(past=not self._show)
            raise StartupError(f"the server ended by itself with exit code {code}; its log stands above")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(timeout=5)


def serve_command(demo: DemoOptions, port: int) -> list[str]:
    return [sys.executable, "-m", "shoal.cli", "serve", demo.model, "--host", demo.host, "--port", str(port)]


def run_demo(demo: DemoOptions, make_command: Callable[[DemoOptions, int], list[str]] = serve_command) -> int:
    """Serve, ask, and serve on. make_command: how a server on a port is started.

    Raises StartupError when the server ends by itself, EngineError when the answer is empty.
    """
    with contextlib.closing(listen_preferably(demo.host, demo.port)) as listener:
        port = port_of(listener)
    if demo.port not in (0, port):
        _console.print(f"Port {demo.port} is taken; taking {port}.")
    # A polite kill ends the demo as Ctrl-C does, so that no server is left behind.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    server = _Server(make_command(demo, port))
    try:
        with ApiClient(format_url(demo.host, port), env.api_key()) as client:
            _wait_until_ready(server, client)
            model = client.models()[0]
            _ask(client, model, demo)
            if demo.once:
                return 0
            _print_ways_on(client.url, model)
        server.show_log()
        server.process.wait()
        server.raise_if_ended()
        return 1
    except KeyboardInterrupt:
        _console.print("\nStopping the server …")
        return 0 if not demo.once else 130
    finally:
        server.stop()


def _wait_until_ready(server: _Server, client: ApiClient) -> None:
    """Progress meanwhile: on a terminal a spinner with the seconds and the log's last line, elsewhere the log."""
    start = time.monotonic()
    if not _console.is_terminal:
        _console.print("Starting the server …")
        server.show_log(past=True)
        while not client.ready():
            server.raise_if_ended()
            time.sleep(0.1)
        server.hide_log()
    else:
        with _console.status("Starting the server …") as status:
            while not client.ready():
                server.raise_if_ended()
                last = escape(server.lines[-1][: max(_console.width - 40, 0)]) if server.lines else ""
                status.update(f"Starting the server … {time.monotonic() - start:.0f} s  [dim]{last}[/dim]")
                time.sleep(0.1)
    _console.print(f"The server is up after {time.monotonic() - start:.1f} s.")


def _ask(client: ApiClient, model: str, demo: DemoOptions) -> None:
    """Print question and answer. Raises EngineError when the answer is empty."""
    _console.print(f"\n[bold]You:[/bold] {escape(demo.question)}\n[bold]{escape(model)}:[/bold] ", end="")
    sys.stderr.flush()
    start = time.monotonic()
    first = None
    length = 0
    messages = [{"role": "user", "content": demo.question}]
    for piece in client.stream_chat(model, messages, temperature=0, max_tokens=demo.max_tokens):
        if piece and first is None:
            first = time.monotonic() - start
        length += len(piece)
        print(piece, end="", flush=True)
    print(flush=True)
    if first is None or not length:
        raise EngineError(f"{model} answered with nothing to: {demo.question}")
    whole = time.monotonic() - start
    _console.print(f"[dim]first words after {first:.2f} s, {length} characters in {whole:.2f} s[/dim]\n")


def _print_ways_on(url: str, model: str) -> None:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "你好"}]}, ensure_ascii=False)
    key = ' -H "Authorization: Bearer $SHOAL_API_KEY"' if env.api_key() else ""
    print(f"{model} is served at {url}/v1 (documentation: {url}/docs). Try, in another terminal:\n")
    print(f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}")
    print(f"  {shlex.quote(sys.argv[0])} chat --url {url}\n")
    print("Ctrl-C stops the server.", flush=True)


COMMAND = Command(
    name="demo",
    description="Serve the embedded model, ask it a question, stream the answer, and serve on until Ctrl-C.",
    sections=(DemoOptions,),
    positional="question",
    run=run_demo,
)
