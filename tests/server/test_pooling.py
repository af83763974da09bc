"""Embeddings, scores and rerank over HTTP, of real small models: clients' forms, errors, the router, a lost engine."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
import transformers
from torch.nn.functional import cosine_similarity, normalize

from shoal.config.options import RouterOptions
from shoal.config.router_settings import BackendSpec, GoldenSpec, RouterSettings
from shoal.router.app import RouterApp
from shoal.router.core import Router
from tests.checkpoints import byte_level_tokenizer, make_checkpoint
from tests.pooling_checkpoints import make_classifier, make_decoder, reference_scores, reference_states
from tests.router.scripted import served, until

TEXTS = ["What is the capital of France?", "北京、上海、西安和成都都很好", "0 1 2 3 4 5 6 7 8 9 10 " * 12]
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %} yes or no?"


class Served:
    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, trust_env=False)

    def error(self, path: str, status: int = 400, **body: Any) -> dict[str, Any]:
        response = self.post(path, **body)
        assert response.status_code == status, response.text
        return dict(response.json()["error"])

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


@contextlib.contextmanager
def serve(path: Path, *arguments: str) -> Iterator[Served]:
    command = [
        sys.executable, "-m", "shoal.cli", "serve", str(path), "--port", "0", "--device", "cpu",
        "--max-model-len", "256", "--max-num-batched-tokens", "96", "--max-num-seqs", "16",
        "--kv-cache-memory", "8MiB", *arguments,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if "Ctrl-C" in line:
                break
        found = re.search(r"http://127\.0\.0\.1:\d+", "".join(lines))
        assert found, "".join(lines)
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield Served(process, found[0])
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        finally:
            process.kill()


def ids(text: str) -> list[int]:
    return list(byte_level_tokenizer()(text)["input_ids"])


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "embed": make_decoder(root / "embed", "qwen3"),
        "score": make_classifier(root / "score", "qwen2"),
        "causal": make_checkpoint(root / "causal", "llama"),
    }


@pytest.fixture(scope="module")
def embedder(paths: dict[str, Path]) -> Iterator[Served]:
    overrides = '{"matryoshka_dimensions": [16, 32]}'
    with serve(paths["embed"], "--served-model-name", "m", "--hf-overrides", overrides) as server:
        yield server


@pytest.fixture(scope="module")
def scorer(paths: dict[str, Path]) -> Iterator[Served]:
    with serve(paths["score"]) as server:
        yield server


@pytest.fixture(scope="module")
def states(paths: dict[str, Path]) -> list[torch.Tensor]:
    """Last states of TEXTS."""
    return [state[-1] for state in reference_states(paths["embed"], [ids(text) for text in TEXTS])]


def assert_close(found: Any, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-4, rtol=1e-4)


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_the_openai_client_asks_for_base64(embedder: Served, states: list[torch.Tensor]) -> None:
    with embedder.openai() as client:
        answer = client.embeddings.create(model="m", input=TEXTS)
        assert [item.index for item in answer.data] == [0, 1, 2]
        assert answer.object == "list" and answer.data[0].object == "embedding" and answer.model == "m"
        for item, state in zip(answer.data, states, strict=True):
            assert_close(item.embedding, normalize(state, dim=0))
        num_tokens = sum(len(ids(text)) for text in TEXTS)
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (num_tokens, num_tokens)
        plain = client.embeddings.create(model="m", input=TEXTS[0], encoding_format="float")
        assert_close(plain.data[0].embedding, normalize(states[0], dim=0))


def test_forms_of_input(embedder: Served) -> None:
    wanted = [item["embedding"] for item in embedder.post("/v1/embeddings", input=TEXTS[:2]).json()["data"]]
    for given in ([ids(text) for text in TEXTS[:2]], ids(TEXTS[0]), TEXTS[0]):
        found = [item["embedding"] for item in embedder.post("/v1/embeddings", input=given, user="me").json()["data"]]
        for one, other in zip(found, wanted, strict=False):
            assert_close(one, torch.tensor(other))
    encoded = embedder.post("/v1/embeddings", input=TEXTS[0], encoding_format="base64").json()["data"][0]["embedding"]
    assert_close(struct.unpack("<64f", base64.b64decode(encoded)), torch.tensor(wanted[0]))


def test_dimensions_and_normalisation(embedder: Served, states: list[torch.Tensor]) -> None:
    for size in (16, 32, 64):
        answer = embedder.post("/v1/embeddings", input=TEXTS[0], dimensions=size).json()
        assert_close(answer["data"][0]["embedding"], normalize(states[0][:size], dim=0))
    for name in ("normalize", "use_activation"):
        answer = embedder.post("/v1/embeddings", input=TEXTS[0], **{name: False}).json()
        assert_close(answer["data"][0]["embedding"], states[0])


def test_texts_are_cut_where_that_is_said(embedder: Served, paths: dict[str, Path]) -> None:
    short = embedder.post("/v1/embeddings", input=TEXTS[2], truncate_prompt_tokens=9).json()
    [state] = reference_states(paths["embed"], [ids(TEXTS[2])[:9]])
    assert_close(short["data"][0]["embedding"], normalize(state[-1], dim=0))
    assert short["usage"]["prompt_tokens"] == 9
    answer = embedder.post("/v1/embeddings", input="x " * 500, truncate_prompt_tokens=-1).json()
    assert answer["usage"]["prompt_tokens"] == 256
    assert embedder.post("/v1/embeddings", input=[5] * 256).json()["usage"]["prompt_tokens"] == 256


def test_many_at_once(embedder: Served, states: list[torch.Tensor]) -> None:
    def ask(number: int) -> None:
        answer = embedder.post("/v1/embeddings", input=[*TEXTS, f"other {number}"]).json()
        for item, state in zip(answer["data"], states, strict=False):
            assert_close(item["embedding"], normalize(state, dim=0))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(24)))


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({}, "input is missing", "input"),
        ({"input": []}, "empty list", "input"),
        ({"input": [[]]}, "empty", "prompt"),
        ({"input": ""}, "empty", "prompt"),
        ({"input": 5}, "input must be a string, a list of strings", "input"),
        ({"input": ["a", 5]}, "input must be a string, a list of strings", "input"),
        ({"input": [5, 100_000]}, "not a token id", "prompt"),
        ({"input": [5] * 257}, "the text has 257 tokens; this model takes 256", "prompt"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "encoding_format"),
        ({"input": "a", "dimensions": 24}, "dimensions 24 is none of this model's: 16, 32, 64", "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions must be 1 or more", "dimensions"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "from 1 to 256, or -1", "truncate_prompt_tokens"),
        ({"input": "a", "normalize": True, "use_activation": False}, "normalize", "normalize"),
        ({"input": "a", "dimension": 16}, "did you mean dimensions", "dimension"),
        ({"input": "a", "add_special_tokens": False}, "send token ids", "add_special_tokens"),
    ],
)
def test_bad_embedding_requests(embedder: Served, body: dict[str, Any], message: str, param: str) -> None:
    error = embedder.error("/v1/embeddings", **body)
    assert message in error["message"] and error["param"] == param
    assert embedder.error("/v1/embeddings", 404, input="a", model="other")["code"] == "model_not_found"


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
def test_scores_of_pairs(scorer: Served, paths: dict[str, Path], path: str) -> None:
    def wanted(*pairs: tuple[str, str]) -> torch.Tensor:
        return torch.cat(reference_scores(paths["score"], [ids(a) + ids(b) for a, b in pairs])).sigmoid()

    def found(**body: Any) -> list[float]:
        answer = scorer.post(path, **body).json()
        assert [item["index"] for item in answer["data"]] == list(range(len(answer["data"])))
        return [item["score"] for item in answer["data"]]

    a, b, c = TEXTS[0], TEXTS[1], "x"
    assert_close(found(text_1=a, text_2=b), wanted((a, b)))
    assert_close(found(text_1=a, text_2=[b, c]), wanted((a, b), (a, c)))
    assert_close(found(text_1=[a, b], text_2=[b, c]), wanted((a, b), (b, c)))
    assert_close(found(queries=a, documents=[b, c]), wanted((a, b), (a, c)))
    raw = torch.cat(reference_scores(paths["score"], [ids(a) + ids(b)]))
    assert_close(found(text_1=a, text_2=b, use_activation=False), raw)
    usage = scorer.post(path, text_1=a, text_2=[b, c]).json()["usage"]
    assert usage["prompt_tokens"] == 2 * len(ids(a)) + len(ids(b)) + len(ids(c))


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_rerank(scorer: Served, path: str) -> None:
    documents = [*TEXTS[:2], "short", "0 1 2 3"]
    scores = [item["score"] for item in scorer.post("/score", text_1="q", text_2=documents).json()["data"]]
    order = sorted(range(4), key=lambda index: -scores[index])
    answer = scorer.post(path, query="q", documents=documents).json()
    assert [result["index"] for result in answer["results"]] == order
    assert_close([result["relevance_score"] for result in answer["results"]], torch.tensor([scores[i] for i in order]))
    assert [result["document"]["text"] for result in answer["results"]] == [documents[index] for index in order]
    best = scorer.post(path, query="q", documents=[{"text": text} for text in documents], top_n=2).json()["results"]
    assert [result["index"] for result in best] == order[:2]
    mixed = [documents[0], *({"text": text, "title": "x"} for text in documents[1:])]
    results = scorer.post(path, query="q", documents=mixed, rank_fields=["text"]).json()["results"]
    assert [(result["index"], result["document"]["text"]) for result in results] == [(i, documents[i]) for i in order]
    assert "document" not in scorer.post(path, query="q", documents=documents, return_documents=False).text


def test_a_model_for_embeddings_scores_by_the_angle(embedder: Served, states: list[torch.Tensor]) -> None:
    answer = embedder.post("/v1/score", text_1=TEXTS[0], text_2=[*TEXTS[1:], TEXTS[0]]).json()
    wanted = [cosine_similarity(states[0], states[index], dim=0) for index in (1, 2, 0)]
    assert_close([item["score"] for item in answer["data"]], torch.stack(wanted))
    assert answer["usage"]["prompt_tokens"] == sum(len(ids(text)) for text in TEXTS)  # each was read once
    best = embedder.post("/v1/rerank", query=TEXTS[0], documents=TEXTS, top_n=1).json()["results"]
    assert best[0]["index"] == 0 and best[0]["relevance_score"] == pytest.approx(1.0, abs=1e-5)
    scores = [embedder.post("/score", text_1=f"{word} fish", text_2=f"{word} fish").json() for word in range(20)]
    assert max(score["data"][0]["score"] for score in scores) <= 1.0


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/score", {"text_1": "a"}, "text_2 is missing"),
        ("/score", {"text_1": "a", "text_2": []}, "text_2 is an empty list"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "2 texts in text_1 and 1 in text_2"),
        ("/score", {"text_1": "a", "documents": ["c"]}, "not both"),
        ("/score", {"text_1": "a", "text_2": 5}, "text_2 must be a string or a list of strings"),
        ("/score", {"text_1": "a", "text_2": "b " * 400}, "tokens; this model takes 256"),
        ("/rerank", {"query": "a"}, "documents is missing"),
        ("/rerank", {"query": "a", "documents": []}, "documents is an empty list"),
        ("/rerank", {"query": "a", "documents": [{"title": "b"}]}, "documents[0] has no text"),
        ("/rerank", {"query": "a", "documents": ["b", 5]}, "a list of strings, or of objects with a text"),
        ("/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": 9}, "truncate_prompt_tokens cuts what"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n must be 0 (all) or more"),
    ],
)
def test_bad_score_requests(scorer: Served, path: str, body: dict[str, Any], message: str) -> None:
    assert message in scorer.error(path, **body)["message"]


def test_pairs_are_cut_where_that_is_said(scorer: Served) -> None:
    answer = scorer.post("/score", text_1="a", text_2="b " * 400, truncate_prompt_tokens=-1).json()
    assert answer["usage"]["prompt_tokens"] == 256


def test_a_reranker_made_of_a_generating_model(paths: dict[str, Path], tmp_path: Path) -> None:
    """With its template, which takes messages of the roles "query" and "document"."""
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    overrides = '{"classifier_from_token": ["a", "b"]}'
    model = transformers.AutoModelForCausalLM.from_pretrained(paths["causal"], dtype=torch.float32).eval()
    prompts = [ids(f"<query>{TEXTS[0]}<document>{text} yes or no?") for text in TEXTS[:2]]
    with torch.inference_mode():
        rows = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    wanted = rows[:, [ids("a")[0], ids("b")[0]]].softmax(1)[:, 1]
    with serve(paths["causal"], "--hf-overrides", overrides, "--chat-template", str(tmp_path / "template.jinja")) as it:
        answer = it.post("/v1/score", text_1=TEXTS[0], text_2=TEXTS[:2]).json()
        assert_close([item["score"] for item in answer["data"]], wanted)
        # What is cut to fit is the document; the question behind it stays.
        cut = it.post("/v1/score", text_1="q", text_2="b " * 400, truncate_prompt_tokens=40).json()
        assert cut["usage"]["prompt_tokens"] <= 40


# --- other kinds of models -------------------------------------------------------------------------------------------


def test_each_kind_refuses_what_the_others_do(embedder: Served, scorer: Served) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    for server, what in ((embedder, "this model makes embeddings"), (scorer, "this model makes scores")):
        for path, body in (("/v1/chat/completions", chat), ("/v1/completions", {"prompt": "hi"})):
            error = server.error(path, **body)
            assert what in error["message"] and error["code"] == "model_kind"
    assert "this model makes scores" in scorer.error("/v1/embeddings", input="a")["message"]
    assert "curl" not in embedder.post("/tokenize", prompt="hi").text


def test_a_generating_model_refuses_them_all() -> None:
    with serve(Path("shoal-tiny"), "--max-model-len", "512") as server:
        for path, body in (
            ("/v1/embeddings", {"input": "a"}),
            ("/v1/score", {"text_1": "a", "text_2": "b"}),
            ("/v1/rerank", {"query": "a", "documents": ["b"]}),
        ):
            error = server.error(path, **body)
            assert "this model generates text" in error["message"] and "--runner pooling" in error["message"]


# --- losses ----------------------------------------------------------------------------------------------------------


def test_requests_of_a_lost_engine_run_again(paths: dict[str, Path], states: list[torch.Tensor]) -> None:
    with serve(paths["embed"], "--max-num-batched-tokens", "16") as server, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.post, "/v1/embeddings", input=TEXTS * 40) for _ in range(4)]
        (core,) = psutil.Process(server.process.pid).children()
        while "shoal:num_requests_running 0" in httpx.get(f"{server.url}/metrics", trust_env=False).text:
            pass
        core.kill()
        for one in asked:
            data = one.result().json()["data"]
            assert len(data) == 120
            for index, item in enumerate(data):
                assert_close(item["embedding"], normalize(states[index % 3], dim=0))
        text = httpx.get(f"{server.url}/metrics", trust_env=False).text
        continued = re.search(r"^shoal:\S*requests_continued\S* ([\d.]+)", text, re.MULTILINE)
        assert continued is not None and float(continued[1]) > 0


async def test_the_router_asks_another_replica(embedder: Served, paths: dict[str, Path]) -> None:
    """They enter without the golden prompt, for they have no text to compare; what one loses another one does."""
    with serve(paths["embed"], "--served-model-name", "m") as second:
        settings = RouterSettings(
            options=RouterOptions(probe_interval=0.1, policy="round-robin"),
            backends=(BackendSpec(url=embedder.url), BackendSpec(url=second.url)),
            aliases={}, golden=GoldenSpec(prompt="golden?"), keys=None, keys_source="keys",
        )  # fmt: skip
        router = Router(settings)
        try:
            async with (
                served(RouterApp(router)) as url,
                httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as client,
            ):
                router.start()
                await until(lambda: all(backend.available for backend in router.pool))

                async def ask(number: int) -> None:
                    body = {"model": "m", "input": [*TEXTS, f"text {number}"]}
                    response = await client.post("/v1/embeddings", json=body)
                    assert response.status_code == 200, response.text
                    assert len(response.json()["data"]) == 4

                asked = [asyncio.create_task(ask(number)) for number in range(40)]
                await asyncio.sleep(0.05)
                second.process.kill()
                await asyncio.gather(*asked)
                for path in ("/score", "/v1/score"):
                    answer = await client.post(path, json={"model": "m", "text_1": "a", "text_2": ["b", "a"]})
                    assert answer.json()["data"][1]["score"] == pytest.approx(1.0, abs=1e-5)
                for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
                    answer = await client.post(path, json={"model": "m", "query": "a", "documents": ["b", "a"]})
                    assert answer.json()["results"][0]["index"] == 1
                refused = await client.post("/v1/completions", json={"model": "m", "prompt": "a"})
                assert refused.status_code == 400 and refused.json()["error"]["code"] == "model_kind"
        finally:
            await router.close()
