"""LoRA adapters through the router: loaded at all servers of a model, or at none; unloaded at all."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from shoal.config.router_settings import BackendSpec
from tests.adapters import make_adapter
from tests.checkpoints import make_checkpoint
from tests.router.conftest import RunningRouter, error_of
from tests.router.scripted import ERROR, ScriptedServer, _json, until
from tests.server.test_pooling import serve

SQL = {"lora_name": "sql", "lora_path": "/adapters/sql"}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


class LoraServer(ScriptedServer):
    """refusals: statuses of its next answers to loads; "late": it loads, and does not say so."""

    def __init__(self, models: tuple[str, ...] = ("m",), refusals: tuple[int | str, ...] = ()) -> None:
        super().__init__(models=models)
        self.adapters: dict[str, str] = {}
        self.calls: list[tuple[str, Any]] = []
        self.call_headers: list[dict[str, str]] = []
        self.refusals = list(refusals)
        self.unload_status = 0
        self.loading = asyncio.Event()
        self.may_load = asyncio.Event()
        self.may_load.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        if path == "/v1/models":
            cards = [{"id": name, "max_model_len": 64, "parent": None} for name in self.models]
            adapters = [{"id": name, "max_model_len": 64, "parent": self.models[0]} for name in self.adapters]
            await _json(send, {"data": cards + adapters})
        elif path in (LOAD, UNLOAD):
            body = json.loads((await receive())["body"])
            self.calls.append((path.split("_")[0].removeprefix("/v1/"), body))
            self.call_headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
            await self._change(path, body, send)
        else:
            await super().__call__(scope, receive, send)

    async def _change(self, path: str, body: dict[str, Any], send: Any) -> None:
        name = body["lora_name"]
        if path == UNLOAD:
            status = self.unload_status or (200 if name in self.adapters else 404)
            if status == 200:
                del self.adapters[name]
            await _json(send, {} if status == 200 else ERROR, status)
            return
        self.loading.set()
        await self.may_load.wait()
        refusal = self.refusals.pop(0) if self.refusals else None
        if isinstance(refusal, int):
            await _json(send, ERROR, refusal)
            return
        self.adapters[name] = body["lora_path"]
        if refusal == "late":
            await asyncio.sleep(5)
        await _json(send, {"status": "loaded"})


async def post(running: RunningRouter, path: str, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return await running.client.post(path, json=body, headers=headers or {})


def urls(*servers: ScriptedServer) -> list[str]:
    return [server.url for server in servers]


async def test_loaded_at_all_servers_used_at_once_and_unloaded(run_router):
    servers = LoraServer(), LoraServer()
    running = await run_router(*servers, probe_interval=60)
    response = await post(running, LOAD, **SQL)
    assert response.status_code == 200, response.text
    assert response.json() == {"status": "loaded", "lora_name": "sql", "servers": urls(*servers)}
    assert [server.calls for server in servers] == [[("load", SQL)]] * 2
    for _ in range(4):
        assert (await running.complete(model="sql")).status_code == 200
    assert [len(server.requests) for server in servers] == [2, 2]
    await until(lambda: all(backend.max_lengths.get("sql") == 64 for backend in running.router.pool), "lists are read")
    cards = (await running.client.get("/v1/models")).json()["data"]
    assert [(card["id"], card.get("parent")) for card in cards] == [("m", None), ("sql", "m")]

    response = await post(running, UNLOAD, lora_name="sql")
    assert response.status_code == 200 and response.json()["servers"] == urls(*servers)
    assert [server.adapters for server in servers] == [{}, {}]
    assert error_of(await running.complete(model="sql"), 404)["code"] == "model_not_found"
    error_of(await post(running, UNLOAD, lora_name="sql"), 404)


@pytest.mark.parametrize("field", ["base_model_name", "model"])
async def test_only_at_servers_of_the_model(run_router, field):
    servers = LoraServer(), LoraServer(models=("n",)), LoraServer(models=("n",))
    running = await run_router(*servers, aliases={"gpt": "n"})
    error = error_of(await post(running, LOAD, **SQL), 400)
    assert error["param"] == "base_model_name" and "there is m, n" in error["message"]
    assert "there is m, n" in error_of(await post(running, LOAD, **SQL, **{field: "x"}), 404)["message"]
    response = await post(running, LOAD, **SQL, **{field: "gpt"})
    assert response.json()["servers"] == urls(*servers[1:])
    assert [server.calls for server in servers] == [[], [("load", SQL)], [("load", SQL)]]
    # Its name is taken there, and is no other model's.
    assert "servers of another model" in error_of(await post(running, LOAD, **SQL, model="m"), 400)["message"]
    error = error_of(await post(running, LOAD, lora_name="m", lora_path="/x", model="n"), 400)
    assert "a model is called 'm'" in error["message"]
    error_of(await post(running, LOAD, lora_name="gpt", lora_path="/x", model="n"), 400)
    error_of(await post(running, LOAD, **SQL, model="n", base_model_name="m"), 400)
    error_of(await post(running, LOAD, lora_path="/x", model="n"), 400)
    assert (await post(running, UNLOAD, lora_name="sql", model="n")).status_code == 200
    assert [len(server.calls) for server in servers] == [0, 2, 2]


@pytest.mark.parametrize(("refusal", "status"), [(400, 400), (500, 502), (503, 503), (401, 502)])
async def test_one_refuses_and_the_others_unload_again(run_router, refusal, status):
    servers = LoraServer(), LoraServer(refusals=(refusal,)), LoraServer()
    running = await run_router(*servers)
    error = error_of(await post(running, LOAD, **SQL), status)
    assert f"{servers[1].url}: on purpose (HTTP {refusal})" in error["message"] and error["code"] == "adapter_refused"
    assert f"it is unloaded again: {servers[0].url}, {servers[2].url}" in error["message"]
    assert [server.adapters for server in servers] == [{}, {}, {}]
    assert [len(server.calls) for server in servers] == [2, 1, 2]
    error_of(await running.complete(model="sql"), 404)
    assert (await post(running, LOAD, **SQL)).status_code == 200


async def test_one_that_does_not_answer_may_have_loaded_it(run_router):
    servers = LoraServer(), LoraServer(refusals=("late",))
    running = await run_router(*servers)
    error = error_of(await post(running, LOAD, {"x-shoal-deadline": "0.3"}, **SQL), 503)
    assert f"{servers[1].url}: it did not answer within 0.3 s" in error["message"]
    assert [server.adapters for server in servers] == [{}, {}]


async def test_what_stays_somewhere_is_said(run_router):
    servers = LoraServer(), LoraServer(refusals=(400,))
    servers[0].unload_status = 500
    running = await run_router(*servers)
    error = error_of(await post(running, LOAD, **SQL, load_inplace=True), 400)
    assert f"may have it still, unload it there: {servers[0].url}" in error["message"]
    servers[0].unload_status = 0
    # One that has none (it may have been started again) is no reason to refuse.
    response = await post(running, UNLOAD, lora_name="sql")
    assert response.status_code == 200 and response.json()["servers"] == urls(servers[0])
    assert (await post(running, LOAD, **SQL)).status_code == 200
    servers[1].unload_status = 500
    error = error_of(await post(running, UNLOAD, lora_name="sql"), 502)
    assert f"{servers[1].url}: on purpose" in error["message"]
    assert f"it is unloaded at {servers[0].url}" in error["message"]


async def test_servers_that_are_away_or_told_nothing(run_router):
    server = LoraServer()
    away = BackendSpec(url="http://127.0.0.1:9")
    running = await run_router(server, more=[away], probe_interval=0.05)
    await until(lambda: all(backend.was_asked for backend in running.router.pool))
    error = error_of(await post(running, LOAD, **SQL), 503)
    assert f"whether these servers need the adapter: {away.url}" in error["message"] and server.calls == []
    running.router.pool.get(away.url).models = ("m",)  # it was there before
    error = error_of(await post(running, LOAD, **SQL), 503)
    assert f"{away.url}: no connection" in error["message"] and server.adapters == {}


async def test_a_client_that_leaves_leaves_nothing_half_loaded(run_router):
    servers = LoraServer(), LoraServer(refusals=(400,))
    servers[1].may_load.clear()
    running = await run_router(*servers)
    with pytest.raises(httpx.ReadTimeout):
        await running.client.post(LOAD, json=SQL, timeout=0.3)
    assert servers[0].adapters and running.router.num_running == 1
    second = asyncio.create_task(post(running, LOAD, lora_name="b", lora_path="/b"))  # waits for the first
    await asyncio.sleep(0.05)
    servers[1].may_load.set()
    assert (await second).status_code == 200
    assert [list(server.adapters) for server in servers] == [["b"], ["b"]]
    names = [[(what, body["lora_name"]) for what, body in server.calls] for server in servers]
    assert names == [[("load", "sql"), ("unload", "sql"), ("load", "b")], [("load", "sql"), ("load", "b")]]


async def test_only_the_operator_may(run_router):
    server = LoraServer()
    running = await run_router(server, admin_key="admin", keys=[{"key": "one", "name": "first"}])
    for path in (LOAD, UNLOAD, LOAD + "/"):
        for headers in ({}, {"authorization": "Bearer one"}):
            error_of(await post(running, path, headers, **SQL), 401)
    assert (await running.client.get(LOAD)).status_code == 405
    assert server.calls == []
    assert (await post(running, LOAD, {"authorization": "Bearer admin"}, **SQL)).status_code == 200
    assert "authorization" not in server.call_headers[0], "the admin key is for the router alone"


async def test_servers_get_their_own_key(run_router):
    server = LoraServer()
    running = await run_router(server)
    assert (await post(running, LOAD, {"authorization": "Bearer theirs"}, **SQL)).status_code == 200
    assert server.call_headers[0]["authorization"] == "Bearer theirs"
    running.router.pool.get(server.url).spec = BackendSpec(url=server.url, api_key="own")
    assert (await post(running, UNLOAD, {"authorization": "Bearer theirs"}, **SQL)).status_code == 200
    assert server.call_headers[1]["authorization"] == "Bearer own"


async def test_a_server_with_models_of_the_file_serves_what_the_file_says(run_router):
    server = LoraServer()
    running = await run_router(server)
    backend = running.router.pool.get(server.url)
    backend.spec = BackendSpec(url=server.url, models=("m", "sql"))
    backend.models = ("m", "sql")
    assert (await post(running, LOAD, **SQL)).status_code == 200
    assert backend.models == ("m", "sql") and (await running.complete(model="sql")).status_code == 200


async def test_with_a_real_server(run_router, tmp_path):
    """Beside one that refuses: it keeps nothing. Then both load, and requests find the adapter at the real one."""
    checkpoint = make_checkpoint(tmp_path / "model", "qwen2")
    adapter = {"lora_name": "sql", "lora_path": str(make_adapter(tmp_path / "sql", checkpoint, seed=1))}
    other = LoraServer(refusals=(400,))
    with serve(checkpoint, "--enable-lora", "--served-model-name", "m") as real:
        running = await run_router(other, more=[BackendSpec(url=real.url)], golden_prompt="off")
        backend = running.router.pool.get(real.url)
        await until(lambda: backend.available)
        error = error_of(await post(running, LOAD, base_model_name="m", **adapter), 400)
        assert f"it is unloaded again: {real.url}" in error["message"]
        assert backend.models == ("m",) and other.adapters == {}

        response = await post(running, LOAD, base_model_name="m", **adapter)
        assert response.json()["servers"] == [other.url, real.url]
        running.backend(0).draining = True
        plain = await running.complete(prompt=[5, 6, 7], ignore_eos=True)
        adapted = await running.complete(model="sql", prompt=[5, 6, 7], ignore_eos=True)
        assert adapted.status_code == plain.status_code == 200 and adapted.json()["model"] == "sql"
        assert adapted.json()["choices"][0]["text"] != plain.json()["choices"][0]["text"]
        await until(lambda: backend.adapters == {"sql": "m"} and not backend.models_are_old)
        assert (
            f"{real.url}: an adapter called 'sql' is loaded already"
            in (error_of(await post(running, LOAD, **adapter), 400)["message"])
        )
        assert (await post(running, UNLOAD, lora_name="sql")).status_code == 200
        error_of(await running.complete(model="sql"), 404)
