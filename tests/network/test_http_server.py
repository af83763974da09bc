"""What API server and router share of HTTP: the bound on heads, CORS, TLS files, who comes from this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tracemalloc

import httpx
import pytest

from shoal.config.options import RouterOptions
from shoal.config.router_settings import BackendSpec
from shoal.errors import ConfigError
from shoal.network.http_protocol import MAX_HEAD_BYTES
from shoal.network.http_server import Cors, check_tls, comes_from_this_machine
from shoal.router.app import RouterApp
from shoal.router.core import Router
from tests.router.conftest import settings_for
from tests.router.scripted import served
from tests.server.in_process import in_process_server

START = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
CHUNKED = START + b"transfer-encoding: chunked\r\ncontent-type: application/json\r\n\r\n2\r\n{}\r\n0\r\n"
# What a client sends first, and what it repeats without an end.
FLOODS = {
    "one value": (START + b"a: ", b"x" * 65536),
    "one name": (START, b"x" * 65536),
    "many headers": (START, b"abc: d\r\n" * 8192),
    "a target": (b"GET /", b"x" * 65536),
    "one trailer": (CHUNKED + b"a: ", b"x" * 65536),
    "many trailers": (CHUNKED, b"abc: d\r\n" * 8192),
    "no request": (b"", b"\r\n" * 32768),
}


async def echo(scope, receive, send):
    """Says how many headers and bytes came."""
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    body = json.dumps([len(scope["headers"]), size, scope["path"]]).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def some_app(kind: str):
    """The URL of a router, of an API server, or of `echo`."""
    async with contextlib.AsyncExitStack() as stack:
        app = echo
        if kind == "router":
            router = Router(settings_for([BackendSpec(url="http://127.0.0.1:1")]))
            stack.push_async_callback(router.close)
            app = RouterApp(router)
        elif kind == "server":
            app = (await stack.enter_async_context(in_process_server())).app
        yield await stack.enter_async_context(served(app))


async def flood(url: str, first: bytes, more: bytes) -> bytes:
    """Send until the server has closed the connection. What it answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    answer = bytearray()

    async def read() -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                answer.extend(data)

    reading = asyncio.create_task(read())
    num_sent = 0
    with contextlib.suppress(ConnectionError):
        writer.write(first)
        while not reading.done():
            assert num_sent < 1 << 28, "the server takes headers without an end"
            writer.write(more)
            num_sent += len(more)
            await writer.drain()
            await asyncio.sleep(0)
    await reading
    writer.close()
    return bytes(answer)


@pytest.mark.parametrize("kind", ["router", "server"])
@pytest.mark.parametrize("what", FLOODS)
async def test_a_flood_of_header_bytes_is_refused(kind, what):
    async with some_app(kind) as url:
        await httpx.AsyncClient(trust_env=False).get(url + "/livez")  # what is loaded once is loaded
        tracemalloc.start()
        try:
            async with asyncio.timeout(60):
                answer = await flood(url, *FLOODS[what])
            grown = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert grown < 16 * 1024 * 1024, grown
        if "trailer" not in what:  # there the request itself has an answer, or its connection is closed
            assert answer.startswith(b"HTTP/1.1 431 "), answer
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b"connection: close" in head and json.loads(body)["error"]["code"] == "headers_too_large"
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(url + "/livez")).status_code == 200


@pytest.mark.parametrize(("size", "status"), [(MAX_HEAD_BYTES - 1024, 200), (MAX_HEAD_BYTES, 431)])
async def test_the_limit_counts_however_the_head_is_cut(size, status):
    request = b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"x" * size + b"\r\nconnection: close\r\n\r\n"
    async with some_app("echo") as url:
        for piece in (len(request), 1000):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            for at in range(0, len(request), piece):
                writer.write(request[at : at + piece])
                await asyncio.sleep(0)
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            assert answer.startswith(b"HTTP/1.1 %d " % status), (piece, answer)


async def test_bodies_and_requests_that_follow_are_not_counted():
    """Large bodies, in chunks and whole, and requests one after the other in the same bytes."""
    plain = b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 300000\r\n\r\n" + b"x" * 300000
    chunks = (
        b"POST /b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + b"1000\r\n%s\r\n" % (b"y" * 4096) * 50
    )
    last = b"0\r\n\r\nGET /c HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    async with some_app("echo") as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write((plain + chunks + last) + b"")
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
    assert answer.count(b"HTTP/1.1 200 ") == 3
    assert b'[2, 300000, "/a"]' in answer and b'[2, 204800, "/b"]' in answer and b'[2, 0, "/c"]' in answer


# --- CORS ------------------------------------------------------------------------------------------------------------


async def test_web_pages_may_call_what_is_for_clients():
    options = RouterOptions(
        allowed_origins=["https://app.example"], allowed_methods=["POST"], allowed_headers=["x-mine"],
        allow_credentials=True,
    )  # fmt: skip
    page = {"origin": "https://app.example"}
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "x-mine"}
    async with served(Cors(echo, options=options)) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        allowed = await client.options("/v1/completions", headers=page | ask)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-credentials"] == "true"
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        assert "retry-after" in (await client.post("/v1/models", headers=page)).headers["access-control-expose-headers"]
        for change in (
            {"origin": "https://evil.example"},
            {"access-control-request-method": "DELETE"},
            {"access-control-request-headers": "x-other"},
        ):
            assert (await client.options("/v1/completions", headers=page | ask | change)).status_code == 400, change


async def test_web_pages_may_not_call_what_is_the_operators():
    page = {"origin": "https://x.example", "access-control-request-method": "POST"}
    async with (
        served(Cors(echo, options=RouterOptions())) as url,
        httpx.AsyncClient(base_url=url, trust_env=False) as client,
    ):
        for path in ("/router/drain", "/internal/v1/continue", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            for response in (await client.options(path, headers=page), await client.post(path, headers=page)):
                assert not [name for name in response.headers if name.startswith("access-control")], path
        assert (await client.options("/v1/models", headers=page)).headers["access-control-allow-origin"] == "*"


# --- TLS files, and addresses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ssl_keyfile": "key.pem"}, "--ssl-keyfile needs --ssl-certfile"),
        ({"ssl_ca_certs": "ca.pem"}, "--ssl-ca-certs needs --ssl-certfile"),
        ({"ssl_cert_reqs": 2}, "--ssl-cert-reqs needs --ssl-certfile"),
        ({"ssl_certfile": "/no-such-file"}, "TLS cannot use /no-such-file"),
    ],
)
def test_tls_options_that_do_not_go_together(given, message):
    with pytest.raises(ConfigError, match=message):
        check_tls(RouterOptions(**given))


@pytest.mark.parametrize(
    ("client", "is_local"),
    [
        (("127.0.0.1", 1), True), (("127.8.0.1", 1), True), (("::1", 1), True), (("::ffff:127.0.0.1", 1), True),
        (("10.0.0.1", 1), False), (("::ffff:10.0.0.1", 1), False), (("testclient", 1), False), (None, False),
    ],
)  # fmt: skip
def test_who_comes_from_this_machine(client, is_local):
    assert comes_from_this_machine({"client": client, "server": ("10.0.0.7", 2)}) is is_local
    assert comes_from_this_machine({"client": client}) is is_local
    if client is not None:
        assert comes_from_this_machine({"client": client, "server": (client[0], 2)})
