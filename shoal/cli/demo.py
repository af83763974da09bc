"""`shoal demo`: a server on the embedded model, one question to it, and an address to go on with."""

from __future__ import annotations

import collections
import contextlib
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO

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


class _Output:
    """What the server writes to one of its streams: kept, and shown while `shown`."""

    def __init__(self, source: IO[str], sink: IO[str]) -> None:
        self.lines: collections.deque[str] = collections.deque(maxlen=200)
        self._sink = sink
        self._shown = False
        self._num_unseen = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._read, args=(source,), name="server-output", daemon=True)
        self._thread.start()

    def _read(self, source: IO[str]) -> None:
        for line in source:
            with self._lock:
                self.lines.append(line.rstrip("\n"))
                self._num_unseen += 1
                if self._shown:
                    self._flush()

    def _flush(self) -> None:
        for line in list(self.lines)[-self._num_unseen :] if self._num_unseen else []:
            print(line, file=self._sink, flush=True)
        self._num_unseen = 0

    def show(self) -> None:
        """Show what nobody has seen yet, and what comes from now on."""
        with self._lock:
            self._flush()
            self._shown = True

    def hide(self) -> None:
        with self._lock:
            self._shown = False

    def wait(self) -> None:
        """Until the stream has ended, or 5 s: a grandchild may hold it open."""
        self._thread.join(timeout=5)


class _Server:
    """`shoal serve` in a process of its own: its log on standard error, its address on standard output."""

    def __init__(self, command: Sequence[str]) -> None:
        # A session of its own: Ctrl-C reaches us alone, and we stop the server once and in order.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=env.subprocess_environment({"PYTHONUNBUFFERED": "1"}),
            start_new_session=True,
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        self.address = _Output(self.process.stdout, sys.stdout)
        self.log = _Output(self.process.stderr, sys.stderr)

    def raise_if_ended(self) -> None:
        code = self.process.poll()
        if code is not None:
            self.log.wait()
            self.log.show()
            raise StartupError(f"the server ended by itself with exit code {code}; its log stands above")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.wait()


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
    signal.signal(signal.SIGTERM, _interrupt)
    server = _Server(make_command(demo, port))
    try:
        with ApiClient(format_url(demo.host, port), env.api_key()) as client:
            _wait_until_ready(server, client)
            model = client.models()[0]
            _ask(client, model, demo)
            if demo.once:
                return 0
        print(f"Talk to it: {shlex.quote(sys.argv[0])} chat --url {client.url}", flush=True)
        server.address.show()
        server.log.show()
        server.process.wait()
        server.raise_if_ended()
        return 1
    except KeyboardInterrupt:
        _console.print("\nStopping the server …")
        return 0 if not demo.once else 130
    finally:
        server.stop()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _wait_until_ready(server: _Server, client: ApiClient) -> None:
    """Progress meanwhile: on a terminal a spinner with the seconds and the log's last line, elsewhere the log."""
    start = time.monotonic()
    if not _console.is_terminal:
        _console.print("Starting the server …")
        server.log.show()
        while not client.ready():
            server.raise_if_ended()
            time.sleep(0.1)
        server.log.hide()
    else:
        with _console.status("Starting the server …") as status:
            while not client.ready():
                server.raise_if_ended()
                last = escape(server.log.lines[-1][: max(_console.width - 40, 0)]) if server.log.lines else ""
                status.update(f"Starting the server … {time.monotonic() - start:.0f} s  [dim]{last}[/dim]")
                time.sleep(0.1)
    server.raise_if_ended()  # then it was another server that answered
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


COMMAND = Command(
    name="demo",
    description="Serve the embedded model, ask it a question, stream the answer, and serve on until Ctrl-C.",
    sections=(DemoOptions,),
    positional="question",
    run=run_demo,
)
