"""The engine core as a subprocess: it comes up, answers, fails with a reason, and never stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from shoal.config.resolve import make_engine_config
from shoal.engine.async_engine import AsyncEngine
from shoal.engine.client import SubprocessClient
from shoal.errors import EngineDeadError, ModelError, StartupError
from shoal.messages import AddRequest, StartupProgress, TokenDelta
from shoal.types import EngineRequest, SamplingParams
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen2")


def make_client(checkpoint: Path, **options: object) -> SubprocessClient:
    values = {"device": "cpu", "max_model_len": 128, "num_gpu_blocks_override": 64, **options}
    return SubprocessClient(make_engine_config(model=str(checkpoint), **values))


async def receive_all(client: SubprocessClient, request_id: str) -> list[TokenDelta]:
    deltas: list[TokenDelta] = []
    while not (deltas and deltas[-1].finish_reason):
        deltas += [delta for delta in (await client.receive()).deltas if delta.request_id == request_id]
    return deltas


def request(request_id: str, max_tokens: int = 5) -> AddRequest:
    return AddRequest(EngineRequest(request_id, [1, 2, 3], SamplingParams(max_tokens=max_tokens, temperature=0.0)))


async def test_answers_and_leaves_nothing_behind(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    client, phases = make_client(checkpoint), []

    def on_progress(progress: StartupProgress) -> None:
        phases.append(progress.phase)

    ready = await client.start(on_progress)
    assert ready.num_blocks == 64 and "load weights" in phases
    process_id = client.process_id
    assert process_id is not None
    await client.send(request("r"))
    deltas = await receive_all(client, "r")
    assert sum(len(delta.token_ids) for delta in deltas) == 5
    assert (await client.utility("stats"))["generation_tokens_total"] == 5
    await client.close()
    assert not psutil.pid_exists(process_id)
    assert not list(tmp_path.iterdir())
    with pytest.raises(EngineDeadError):
        await client.send(request("late"))


async def test_close_lets_running_requests_finish_when_asked(checkpoint: Path) -> None:
    client = make_client(checkpoint)
    await client.start()
    await client.send(request("r", 100))
    first = await client.receive()
    closing = asyncio.create_task(client.close(drain_seconds=30))
    await asyncio.sleep(0)
    assert first is not None
    await closing


async def test_a_killed_core_is_reported_to_all_who_wait(checkpoint: Path) -> None:
    client = make_client(checkpoint)
    await client.start()
    assert client.process_id is not None
    waiting = asyncio.create_task(receive_all(client, "never"))
    await asyncio.sleep(0.05)
    os.kill(client.process_id, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="signal 9"):
        await waiting
    with pytest.raises(EngineDeadError):
        await client.utility("ping")
    await client.close()


async def test_what_is_sent_to_a_core_that_has_just_died_is_not_waited_for(checkpoint: Path) -> None:
    client = make_client(checkpoint)
    await client.start()
    assert client._process is not None
    client._process.kill()
    client._process.wait()
    await asyncio.sleep(0.1)  # its end of the socket is gone, and the client does not know yet
    with pytest.raises(EngineDeadError, match="signal 9"):
        await asyncio.wait_for(client.send(request("r")), 10)
    await asyncio.wait_for(client.close(), 10)


async def test_a_core_that_cannot_start_says_why(checkpoint: Path, tmp_path: Path) -> None:
    broken = make_checkpoint(tmp_path, "qwen2")
    for file in broken.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    client = make_client(broken)
    with pytest.raises(ModelError, match="safetensors"):
        await client.start()


async def test_a_core_that_is_stopped_while_it_starts_is_called_so(checkpoint: Path) -> None:
    client = make_client(checkpoint, startup_timeout=1)
    starting = asyncio.create_task(client.start())
    while client.process_id is None:
        await asyncio.sleep(0)
    os.kill(client.process_id, signal.SIGSTOP)
    with pytest.raises(StartupError, match=f"startup-timeout.*was stopped .pid {client.process_id}"):
        await starting


async def test_a_core_that_is_late_is_ended(checkpoint: Path) -> None:
    client = make_client(checkpoint, startup_timeout=1)
    with pytest.raises(StartupError, match="startup-timeout"):
        await client.start()
    assert client.process_id is not None and not psutil.pid_exists(client.process_id)


@pytest.mark.parametrize("how", ["parent", "group", "stopped"])
def test_the_core_ends_with_a_parent_that_was_killed(checkpoint: Path, tmp_path: Path, how: str) -> None:
    """group: both at once, as when a container is ended. stopped: the core cannot see it by itself."""
    program = f"""
import asyncio, os
from pathlib import Path
from tests.engine.test_client import make_client
async def main():
    client = make_client(Path({str(checkpoint)!r}))
    await client.start()
    print(client.process_id, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        core = int(parent.stdout.readline())
        assert psutil.pid_exists(core)
        if how == "stopped":
            os.kill(core, signal.SIGSTOP)
        if how == "group":
            os.killpg(parent.pid, signal.SIGKILL)
        else:
            parent.kill()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(core) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(core)
    assert not list(tmp_path.glob("shoal-*"))


def test_the_core_removes_nothing_but_its_sockets_when_the_parent_is_gone(tmp_path: Path) -> None:
    for name in ("in", "out", "somebody's file"):
        (tmp_path / name).touch()
    endpoints = [f"ipc://{tmp_path / name}" for name in ("in", "out")]
    program = f"from shoal.engine.parent import end_with_parent; end_with_parent({endpoints!r})"
    ended = subprocess.run([sys.executable, "-c", program], stdin=subprocess.DEVNULL, timeout=60)
    assert ended.returncode == 3
    assert [path.name for path in tmp_path.iterdir()] == ["somebody's file"]


async def test_a_core_that_speaks_nonsense_is_reported(checkpoint: Path) -> None:
    program = """
import sys, msgspec, zmq
from shoal.messages import CoreReady
sys.stdin.buffer.readline()
context = zmq.Context()
output = context.socket(zmq.PUSH)
output.connect(sys.argv[sys.argv.index("--output") + 1])
output.send(msgspec.msgpack.encode(CoreReady(0, 128, 64, 16, {})))
output.send(b"nonsense")
sys.stdin.buffer.read()
"""
    client = make_client(checkpoint)
    client.program = [sys.executable, "-c", program]
    await client.start()
    with pytest.raises(EngineDeadError, match="cannot be taken in"):
        await asyncio.wait_for(client.receive(), 10)
    assert client._process is not None
    client._process.kill()
    await client.close()


@pytest.mark.parametrize(
    ("timeouts", "why"),
    [
        ({"step_timeout": 2, "stall_timeout": 0}, "made no step for 2 s although it has work .--step-timeout"),
        ({"stall_timeout": 1}, "said nothing for 1 s although it has work .--stall-timeout"),
    ],
)
async def test_a_core_that_is_stopped_is_ended(checkpoint: Path, timeouts: dict[str, float], why: str) -> None:
    client = make_client(checkpoint, skip_tokenizer_init=True, **timeouts)
    await client.start()
    engine = AsyncEngine(client, client._config, None)
    await engine.start()
    assert client.process_id is not None
    os.kill(client.process_id, signal.SIGSTOP)
    with pytest.raises(EngineDeadError, match=f"{why}.*was stopped"):
        await asyncio.wait_for(engine.collect(engine.prepare([1, 2, 3], SamplingParams(max_tokens=5))), 30)
    assert not engine.alive
    await asyncio.wait_for(engine.close(), 10)
    assert not psutil.pid_exists(client.process_id)
