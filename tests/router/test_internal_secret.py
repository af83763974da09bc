"""/internal/… of a server: who may use it, and what the router shows."""

from __future__ import annotations

import dataclasses

import httpx
import pytest

from shoal.config.router_settings import BackendSpec
from shoal.network import internal_secret
from shoal.network.token import create_token
from shoal.protocol.internal import PATH, REQUEST_MEDIA_TYPE, TOKEN_HEADER, encode_request
from shoal.router.app import RouterApp
from shoal.router.core import Router
from tests.router.conftest import RunningRouter, error_of, settings_for
from tests.router.scripted import ScriptedServer, served, until
from tests.server.in_process import InProcessServer, first_request, in_process_server

SECRET = "a-secret-of-the-routers"
BODY = {"model": "tiny", "prompt": "hello", "max_tokens": 3}


@dataclasses.dataclass
class Distant:
    """An app as somebody from another machine sees it."""

    server: InProcessServer
    host: str = "10.1.2.3"

    async def __call__(self, scope, receive, send):
        await self.server.app({**scope, "client": (self.host, 1)}, receive, send)


async def status_of(app, headers=None) -> int:
    """What a router's request gets."""
    request = encode_request(first_request("/v1/completions", BODY))
    async with served(app) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        given = {"content-type": REQUEST_MEDIA_TYPE, **(headers or {})}
        response = await client.post(PATH, content=request, headers=given)
        if response.status_code != 200:
            assert error_of(response, 401)["code"] in ("invalid_internal_token", "invalid_api_key")
            assert error_of(await client.get("/internal/else", headers=headers), 401), "all of /internal/ is guarded"
        return response.status_code


@pytest.mark.parametrize(
    ("secret", "api_key", "host", "headers", "status"),
    [
        (None, None, "127.0.0.1", {}, 200),
        (None, None, "10.1.2.3", {}, 401),
        (None, None, "10.1.2.3", {TOKEN_HEADER: "x" * 20}, 401),
        (None, "key", "10.1.2.3", {}, 401),
        (None, "key", "10.1.2.3", {"authorization": "Bearer key"}, 200),
        (SECRET, None, "127.0.0.1", {}, 401),
        (SECRET, None, "10.1.2.3", {TOKEN_HEADER: SECRET}, 200),
        (SECRET, None, "10.1.2.3", {TOKEN_HEADER: SECRET + "x"}, 401),
        (SECRET, "key", "10.1.2.3", {"authorization": "Bearer key"}, 401),
        (SECRET, "key", "10.1.2.3", {TOKEN_HEADER: SECRET}, 401),
        (SECRET, "key", "10.1.2.3", {TOKEN_HEADER: SECRET, "authorization": "Bearer key"}, 200),
    ],
)
async def test_who_may_use_it(secret, api_key, host, headers, status):
    async with in_process_server(secret=secret, api_key=[api_key] if api_key else []) as server:
        assert await status_of(Distant(server, host), headers) == status


async def test_what_is_for_clients_stays_open():
    async with (
        in_process_server(secret=SECRET) as server,
        served(Distant(server)) as url,
        httpx.AsyncClient(base_url=url, trust_env=False) as client,
    ):
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200
        assert (await client.get("/version")).json()["internal"] == ["continue/1"]


@pytest.mark.parametrize("kind", ["auto", "shoal"])
async def test_a_router_with_the_secret_is_let_in_and_one_without_says_why_not(kind):
    async with in_process_server(secret=SECRET) as server, served(Distant(server)) as url:
        for secret in (SECRET, None, "y" * 20):
            settings = settings_for([BackendSpec(url=url, kind=kind)], golden_prompt="off")
            router = Router(settings, secret)
            try:
                async with (
                    served(RouterApp(router)) as front,
                    httpx.AsyncClient(base_url=front, trust_env=False, timeout=30) as client,
                ):
                    running = RunningRouter(router, [], client, front)
                    router.start()
                    (backend,) = router.pool
                    if secret == SECRET:
                        await until(lambda backend=backend: backend.available)
                        response = await running.complete(**BODY)
                        assert response.status_code == 200, response.text
                        assert backend.native
                    else:
                        await until(lambda backend=backend: "shuts this router out" in backend.health.why)
                        state = (await client.get("/router/backends")).json()["backends"][0]
                        assert "--internal-token" in state["why_out"] and state["alive"]
            finally:
                await router.close()


async def test_the_secret_goes_to_internal_paths_of_servers_only(run_router):
    native, foreign = ScriptedServer(), ScriptedServer(native=False)
    running = await run_router(native, foreign)
    running.router.context.internal_secret = SECRET
    for _ in range(4):
        assert (await running.complete()).status_code == 200
    await running.client.post("/v1/embeddings", json={"model": "m", "input": "x"})
    await running.client.post("/v1/embeddings", json={"model": "m", "input": "x"})
    shown = [TOKEN_HEADER in headers for headers in native.headers]
    assert shown.count(True) == 2 and shown.count(False) == 1, "of two requests by frames and one that is passed on"
    assert foreign.headers and not any(TOKEN_HEADER in headers for headers in foreign.headers)


def test_where_it_comes_from(monkeypatch, tmp_path):
    """The flag, else a secret made from the cluster's token: the same everywhere, and not the token itself."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert internal_secret(None) is None
    token = create_token()
    made = internal_secret(None)
    assert made is not None and token not in made and len(made) == 64
    assert internal_secret(SECRET) == SECRET
    (tmp_path / ".shoal" / "cluster-token").unlink()
    monkeypatch.setenv("SHOAL_CLUSTER_TOKEN", token)
    assert internal_secret(None) == made
    file = tmp_path / "token"
    file.write_text("another-token-of-a-cluster\n")
    assert internal_secret(None, str(file)) not in (None, made)
    with pytest.raises(ValueError, match="the internal token in --internal-token must be 16 or more printable"):
        internal_secret("short")
