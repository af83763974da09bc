"""What a person sees while the engine comes up and when it is there; what a client gets until then. Used by run.py."""

from __future__ import annotations

import json
import shlex
import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal.config.engine_config import EngineConfig
from shoal.config.options import ServerOptions
from shoal.config.parallel import ParallelConfig
from shoal.config.pooling import PoolingConfig
from shoal.config.sizes import format_size
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import UnavailableError
from shoal.log import get_logger
from shoal.messages import CoreReady, StartupProgress
from shoal.server.error_handlers import error_response
from shoal.version import __version__

_SECONDS_BETWEEN_LINES = 2.0

logger = get_logger(__name__)


class Gate:
    """The ASGI app from the first moment on: until the engine is there it says so to everybody who asks."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None
        self.phase = "starting"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope)(scope, receive, send)

    def _answer(self, scope: Scope) -> Response:
        if scope["path"] == "/livez":
            return Response(b'{"status":"starting"}', media_type="application/json")
        return error_response(UnavailableError(f"the server is starting ({self.phase}); try again soon"))


class StartupDisplay:
    """Shows the phases of the start: one live line on a terminal, a line now and then elsewhere."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0

    def __enter__(self) -> StartupDisplay:
        if self._console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description} {task.fields[share]}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task("start the engine", total=None, share="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, news: StartupProgress) -> None:
        """The engine core has got on."""
        is_new = news.phase != self._gate.phase
        self._gate.phase = news.phase
        share = f"{100 * news.done // news.total} %" if news.total else ""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=news.phase, share=share)
        elif is_new or time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            logger.info("%s%s", news.phase, f" … {share}" if share and not is_new else "")


def describe_engine(config: EngineConfig, ready: CoreReady, seconds: float) -> list[str]:
    """What came up, in a few lines."""
    facts = ready.info
    num_tokens = (ready.num_blocks - 1) * ready.block_size
    size = facts.get("kv_cache_bytes")
    mode = ", deterministic" if config.deterministic else ""
    layout = describe_layout(config.parallel)
    hosts = facts.get("hosts", ())
    where = f" of {', '.join(hosts)}" if len(hosts) > 1 else ""
    lines = [
        f"Shoal {__version__}: {config.model.architecture}, {f'{layout} in ' if layout else ''}"
        f"{facts.get('dtype', config.dtype)} on {facts.get('device', config.device)}{where}{mode}, "
        f"up after {seconds:.1f} s",
        f"KV cache: {num_tokens:,} tokens{f' ({format_size(size)})' if size else ''}, "
        f"{num_tokens / ready.max_model_len:.1f} requests of the full {ready.max_model_len:,} tokens",
    ]
    return lines if size != 0 else lines[:1]  # encoders keep none


def describe_layout(parallel: ParallelConfig) -> str:
    """How many ranks share the work and how ("2 replicas × TP=4"); nothing for one."""
    parts = [f"{parallel.data_size} replicas"] if parallel.data_size > 1 else []
    for name, size in (("TP", parallel.tensor_size), ("PP", parallel.pipeline_size)):
        if size > 1:
            parts.append(f"{name}={size}")
    if parallel.expert_parallel:
        parts.append("experts shared whole")
    return " × ".join(parts)


def describe_address(
    url: str,
    model: str,
    options: ServerOptions,
    tokenizer: Tokenizer | None,
    pooling: PoolingConfig | None = None,
) -> list[str]:
    """Where it is, and a line that works."""
    key = ' -H "Authorization: Bearer $SHOAL_API_KEY"' if options.api_key else ""
    insecure = " -k" if options.ssl_certfile else ""
    path = "completions"
    content: dict[str, object] = {"prompt": [1, 2, 3] if tokenizer is None else "Hello", "max_tokens": 32}
    if pooling is not None and pooling.task == "embed":
        path, content = "embeddings", {"input": [1, 2, 3] if tokenizer is None else "Hello"}
    elif pooling is not None:
        path, content = "score", {"text_1": "What is Shoal?", "text_2": ["A school of fish.", "A sandbank."]}
    elif tokenizer is not None and tokenizer.has_chat_template:
        path, content = "chat/completions", {"messages": [{"role": "user", "content": "你好"}]}
    body = shlex.quote(json.dumps({"model": model, **content}, ensure_ascii=False))
    return [
        f"{model} is served at {url}/v1 (documentation: {url}/docs). Try:",
        f"  curl{insecure} {url}/v1/{path}{key} -H 'Content-Type: application/json' -d {body}",
        "Ctrl-C lets running requests finish; a second Ctrl-C does not.",
    ]
