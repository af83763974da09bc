"""The router as a process: `shoal router`, its signals, its file, and the commands that ask it."""

from __future__ import annotations

import asyncio
import signal
import sys

import httpx
import pytest

from shoal.cli.main import main
from shoal.network import free_port
from tests.router.conftest import error_of, text_of
from tests.router.scripted import ScriptedServer, served
from tests.server.live_server import trusting
from tests.server.test_access import make_certificate

GOLDEN = 'golden: {prompt: "golden?"}\n'


class Program:
    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process = process
        self.url = url
        self.log = ""
        self.client = httpx.AsyncClient(base_url=url, trust_env=False, timeout=30)

    async def until_logged(self, words: str) -> None:
        async with asyncio.timeout(30):
            while words not in self.log:
                line = await self.process.stderr.readline()
                assert line, f"it ended without saying {words!r}:\n{self.log}"
                self.log += line.decode()

    async def command(self, *arguments: str) -> tuple[int, str]:
        """`shoal router …` against this router: its exit code and what it prints."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "shoal.cli", "router", *arguments, "--router", self.url,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        out, _ = await process.communicate()
        return process.returncode, out.decode()

    async def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            _, rest = await self.process.communicate()
        self.log += rest.decode()
        return self.process.returncode


@pytest.fixture
async def start_program():
    programs = []

    async def start(*arguments: str) -> Program:
        port = free_port()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "shoal.cli", "router", "--port", str(port), *arguments,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        programs.append(Program(process, f"http://127.0.0.1:{port}"))
        return programs[-1]

    yield start
    for program in programs:
        if program.process.returncode is None:
            program.process.kill()
            await program.process.wait()
        await program.client.aclose()


async def test_a_life(start_program, tmp_path):
    """The file changes, is broken, is right again; a server is drained; the router ends while a stream runs."""
    first, second = ScriptedServer(), ScriptedServer()
    async with served(first) as first.url, served(second) as second.url:
        file = tmp_path / "router.yaml"
        file.write_text(f"backends: [{first.url}]\nprobe_interval: 0.05\n{GOLDEN}", encoding="utf-8")
        program = await start_program("--config", str(file), "--peer", "http://127.0.0.1:1")
        await program.until_logged(f"{first.url} is in")
        file.write_text(f"backends: [{first.url},\n {second.url}]\nplicy: x\n{GOLDEN}", encoding="utf-8")
        await program.until_logged("line 3: plicy is not an option; did you mean policy?; the settings stay")
        file.write_text(f"backends: [{first.url}, {second.url}]\nshutdown_timeout: 9\n{GOLDEN}", encoding="utf-8")
        await program.until_logged(f"{second.url} is in")
        await program.until_logged("shutdown_timeout count from the next start on")

        code, out = await program.command("drain", first.url)
        assert code == 0 and "gets no new requests; 0 run there" in out
        code, out = await program.command("status")
        assert code == 0 and "out: is drained by an operator" in out and "takes requests" in out
        assert "router http://127.0.0.1:1: down: no connection" in out
        code, out = await program.command("drain", "http://nobody")
        assert code == 1 and "no server here has the url 'http://nobody'" in out

        second.gate.clear()
        body = {"model": "m", "prompt": "count", "max_tokens": 5, "stream": True}
        streaming = asyncio.create_task(program.client.post("/v1/completions", json=body))
        await asyncio.wait_for(second.started.wait(), 20)
        ending = asyncio.create_task(program.end())
        async with asyncio.timeout(20):
            while (await program.client.get("/readyz")).status_code != 503:
                await asyncio.sleep(0.01)
        second.gate.set()
        assert text_of(await streaming) == " 0 1 2 3 4"
        assert await ending == 0
        assert "Traceback" not in program.log


async def test_tls_and_web_pages(start_program, tmp_path):
    """The flags of `shoal serve`: certificates of server and clients, and origins."""
    certificate, key = make_certificate(tmp_path)
    server = ScriptedServer()
    async with served(server) as server.url:
        program = await start_program(
            "--backend", server.url, "--golden-prompt", "off", "--probe-interval", "0.05",
            "--ssl-certfile", certificate, "--ssl-keyfile", key, "--ssl-ca-certs", certificate,
            "--allowed-origins", "https://app.example",
        )  # fmt: skip
        await program.until_logged("is in")
        url = program.url.replace("http://", "https://")
        context = trusting(certificate)
        async with httpx.AsyncClient(base_url=url, trust_env=False, verify=context) as client:
            with pytest.raises(httpx.HTTPError):  # it has no certificate to show
                await client.get("/health")
        context.load_cert_chain(certificate, key)
        async with httpx.AsyncClient(base_url=url, trust_env=False, verify=context) as client:
            body = {"model": "m", "prompt": "count", "max_tokens": 5, "stream": True}
            response = await client.post("/v1/completions", json=body, headers={"origin": "https://app.example"})
            assert text_of(response) == " 0 1 2 3 4"
            assert response.headers["access-control-allow-origin"] == "https://app.example"
        with pytest.raises(httpx.HTTPError):
            await program.client.get("/health")
        assert await program.end() == 0


async def test_what_does_not_end_by_itself_is_ended(start_program):
    server = ScriptedServer()
    async with served(server) as server.url:
        program = await start_program(
            "--backend", server.url, "--golden-prompt", "off", "--shutdown-timeout", "0.2", "--probe-interval", "0.05"
        )
        await program.until_logged("is in")
        server.gate.clear()
        body = {"model": "m", "prompt": "count", "stream": True}
        streaming = asyncio.create_task(program.client.post("/v1/completions", json=body))
        await asyncio.wait_for(server.started.wait(), 20)
        assert await program.end() == 0
        assert "shut down before the answer was whole" in error_of(await streaming, 503)["message"]
        await asyncio.wait_for(server.disconnected.wait(), 10)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["router"], 2, "no server to route to"),
        (["router", "http://x"], 2, "servers are given as --backend http://x"),
        (["router", "--backend", "http://x", "--ssl-keyfile", "k"], 2, "--ssl-keyfile needs --ssl-certfile"),
        (["router", "--backend", "http://x", "--internal-token", "short"], 2, "--internal-token must be 16 or more"),
        (["router", "drain"], 2, "which server? shoal router drain URL"),
        (["router", "--backend", "http://x", "--policy", "rond-robin"], 2, "did you mean round-robin?"),
        (["router", "--backend", "http://x", "--peer", "10.0.0.1:9000"], 2, "--peer must be a URL such as http://"),
        (["router", "--backend", "http://x", "--load-factor", "2"], 2, "has no use for load_factor"),
        (["router", "status", "--router", "127.0.0.1:1"], 2, "--router must begin with http://"),
        (["router", "status", "--router", "http://127.0.0.1:1"], 1, "no router answers at http://127.0.0.1:1"),
    ],
)
def test_errors_are_one_line(arguments, code, message, capsys):
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("shoal: error: ") and message in error and error.count("\n") == 1
