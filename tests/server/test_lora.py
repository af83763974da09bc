"""LoRA adapters over HTTP: named as the model, loaded and unloaded while the server runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters import make_adapter
from tests.checkpoints import make_checkpoint
from tests.server.test_pooling import Served, serve

PROMPT = [5, 6, 7, 8, 9, 10, 11]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("lora") / "model", "qwen2")


@pytest.fixture(scope="module")
def adapters(checkpoint: Path) -> list[Path]:
    return [make_adapter(checkpoint.parent / f"adapter-{seed}", checkpoint, seed=seed) for seed in range(3)]


def complete(server: Served, model: str | None) -> str:
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    response = server.post("/v1/completions", **body, **({} if model is None else {"model": model}))
    assert response.status_code == 200, response.text
    assert model is None or response.json()["model"] == model
    return str(response.json()["choices"][0]["token_ids"])


def test_adapters_come_and_go(checkpoint: Path, adapters: list[Path], tmp_path: Path) -> None:
    given = ["--enable-lora", "--max-loras", "2", "--lora-modules", f"first={adapters[0]}"]
    with serve(checkpoint, *given, "--served-model-name", "base") as server:
        base, first = complete(server, None), complete(server, "first")
        assert base == complete(server, "base") != first
        assert server.post("/v1/load_lora_adapter", lora_name="second", lora_path=str(adapters[1])).status_code == 200
        second = complete(server, "second")
        assert len({base, first, second}) == 3
        models = {card.id: card for card in server.openai().models.list().data}
        assert set(models) == {"base", "first", "second"}
        assert models["second"].model_extra["parent"] == "base"

        with ThreadPoolExecutor(12) as pool:  # in one batch
            names = ["base", "first", "second"] * 8
            expected = {"base": base, "first": first, "second": second}
            assert list(pool.map(lambda name: complete(server, name), names)) == [expected[name] for name in names]

        error = server.error("/v1/load_lora_adapter", lora_name="third", lora_path=str(adapters[2]))
        assert "all 2 places for adapters are taken (first, second)" in error["message"]
        assert "already" in server.error("/v1/load_lora_adapter", lora_name="first", lora_path="/x")["message"]
        assert server.post("/v1/unload_lora_adapter", lora_name="first").status_code == 200
        assert server.error("/v1/completions", 404, model="first", prompt="x")["code"] == "model_not_found"
        server.error("/v1/unload_lora_adapter", 404, lora_name="first")

        foreign = make_checkpoint(tmp_path / "foreign", "qwen2", hidden_size=128)
        stranger = make_adapter(tmp_path / "stranger", foreign, seed=1)
        error = server.error("/v1/load_lora_adapter", lora_name="stranger", lora_path=str(stranger))
        assert "the adapter is of another model" in error["message"]
        # Its place is free again.
        assert server.post("/v1/load_lora_adapter", lora_name="third", lora_path=str(adapters[2])).status_code == 200
        assert complete(server, "third") not in (base, first, second)
        chat = server.post("/v1/chat/completions", model="third", messages=[{"role": "user", "content": "hi"}])
        assert chat.status_code == 200 and chat.json()["model"] == "third"


def test_what_cannot_be_used_harms_nobody(checkpoint: Path, adapters: list[Path], tmp_path: Path) -> None:
    """One that holds no numbers, or does not fit: refused by name, and the one of that name stays."""
    broken = make_adapter(tmp_path / "broken", checkpoint, seed=4)
    tensors = load_file(broken / "adapter_model.safetensors")
    save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, broken / "adapter_model.safetensors")
    embedding = make_adapter(tmp_path / "embedding", checkpoint, seed=4, targets=("embed_tokens",))
    with serve(checkpoint, "--enable-lora", "--max-loras", "2", "--lora-modules", f"first={adapters[0]}") as server:
        base, first = complete(server, None), complete(server, "first")
        error = server.error("/v1/load_lora_adapter", lora_name="broken", lora_path=str(broken))
        assert "holds numbers that are not finite" in error["message"]
        for path, message in ((broken, "not finite"), (embedding, "no linear layer model.embed_tokens")):
            body: dict[str, Any] = {"lora_name": "first", "lora_path": str(path), "load_inplace": True}
            assert message in server.error("/v1/load_lora_adapter", **body)["message"]
            assert (complete(server, "first"), complete(server, None)) == (first, base)
        body = {"lora_name": "first", "lora_path": str(adapters[1]), "load_inplace": True}
        assert server.post("/v1/load_lora_adapter", **body).status_code == 200
        assert complete(server, "first") not in (first, base)
        # Its place, full of what was tried in it, takes the next one.
        assert server.post("/v1/load_lora_adapter", lora_name="second", lora_path=str(adapters[0])).status_code == 200
        assert complete(server, "second") == first


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--served-model-name", "base", "--lora-modules", "base={}"], "the model itself is called that"),
        (["--lora-modules", "a=/nowhere/at/all"], "lora_modules a: there is no adapter in '/nowhere/at/all'"),
    ],
)
def test_found_before_the_engine_starts(checkpoint: Path, adapters: list[Path], given: list[str], message: str) -> None:
    arguments = [text.replace("{}", str(adapters[0])) for text in given]
    with pytest.raises(AssertionError, match=message), serve(checkpoint, "--enable-lora", *arguments):
        pass


def test_without_room_for_adapters(checkpoint: Path, adapters: list[Path]) -> None:
    with serve(checkpoint) as server:
        error = server.error("/v1/load_lora_adapter", lora_name="a", lora_path=str(adapters[0]))
        assert "start it with --enable-lora" in error["message"]
