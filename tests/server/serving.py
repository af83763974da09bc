"""`serve` on fake cores as a process, for tests of its whole life: what it prints, what it answers, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.config.model_directory import write_model_directory
from tests.engine import tokenizers_for_tests


def make_model(directory: Path) -> Path:
    """A model directory with a tokenizer and no weights."""
    write_model_directory(directory, vocab_size=512)
    tokenizers_for_tests.save("byte_level", directory)
    return directory


IDS = {"return_token_ids": True}


class Serving:
    """The process, what it printed so far, and its address."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 40
        while not condition():
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def until_ready(self) -> None:
        self.until(lambda: "Ctrl-C" in self.output)

    def cores(self) -> list[psutil.Process]:
        """In the order of the replicas."""
        children = psutil.Process(self.process.pid).children()
        return sorted(children, key=lambda child: (child.create_time(), child.pid))

    def core(self) -> psutil.Process:
        (core,) = self.cores()
        return core

    def wait(self) -> int:
        code = self.process.wait(40)
        self._reader.join(10)
        return code

    def status(self, path: str) -> int:
        return httpx.get(self.url + path, trust_env=False).status_code

    def num_running(self) -> int:
        text = httpx.get(self.url + "/metrics", trust_env=False).text
        found = re.search(r"shoal:time_to_first_token_seconds_count\S* (\S+)", text)
        assert found is not None
        return int(float(found[1]))


@contextlib.contextmanager
def serving(
    model: Path, *core: str, with_tokenizer: bool = False, num_replicas: int = 1, **options: Any
) -> Iterator[Serving]:
    """A server on a free port, with fake cores. At the end no process of it is left, whoever ended it.

    core: arguments of the cores. Without a tokenizer it takes token ids only, and is up in a second instead of several.
    """
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    model_options = {"model": str(model), "skip_tokenizer_init": not with_tokenizer}
    given = {"port": port, "served_model_name": ["tiny"], **options}
    program = [sys.executable, "-m", "tests.server.serve_program"]
    command = [*program, json.dumps(model_options), json.dumps(given), str(num_replicas), *core]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        running = Serving(process, port)
        children: list[psutil.Process] = []
        try:
            yield running
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children(recursive=True)
            if process.poll() is None:
                process.kill()
            process.wait(20)
            _, alive = psutil.wait_procs(children, timeout=15)
            assert not alive, "the core outlived its server"


@contextlib.contextmanager
def streaming(server: Serving, num_tokens: int) -> Iterator[Future[httpx.Response]]:
    """A stream that has begun; its result is the whole of it."""
    body = {"model": "tiny", "prompt": [1], "max_tokens": num_tokens, "stream": True, **IDS}
    before = server.num_running()
    with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=60, trust_env=False) as http:
        future = pool.submit(http.post, f"{server.url}/v1/completions", json=body)
        server.until(lambda: server.num_running() > before)
        yield future
