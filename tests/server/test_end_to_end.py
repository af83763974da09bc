"""`shoal serve` as a user runs it: the embedded model, the official client, deterministic text in any company."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from shoal.protocol.internal import PATH, REQUEST_MEDIA_TYPE, Finished, encode_request
from tests.server.in_process import Journal, first_request
from tests.server.reading import joined

QUESTIONS = ["给我推荐中国适合旅游的地方", "你好", "What is Shoal?", "Tell me about Shanghai", "What is 12 + 30?"]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server on the embedded model, in a process of its own."""
    command = [sys.executable, "-m", "shoal.cli", "serve", "--port", "0", "--max-num-seqs", "40"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    url = ""
    for line in process.stdout:
        lines.append(line)
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        if found:
            url = found[0]
        if "curl" in line:
            break
    rest = process.stdout
    threading.Thread(target=rest.read, daemon=True).start()  # never let the pipe fill up
    assert url, "".join(lines)
    yield url
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, question: str, *, stream: bool, **options: object) -> str:
    messages = [{"role": "user", "content": question}]
    values: dict = {"model": "shoal-tiny", "messages": messages, "max_tokens": 80, "temperature": 0.0, **options}
    if not stream:
        return client.chat.completions.create(**values).choices[0].message.content
    chunks = client.chat.completions.create(stream=True, **values)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_answers_in_chinese_sensibly(client: openai.OpenAI) -> None:
    for question in ("给我推荐中国适合旅游的地方", "给我推荐中国适合旅游的方"):
        answer = ask(client, question, stream=False, max_tokens=300)
        assert sum("\u4e00" <= character <= "\u9fff" for character in answer) > 20
        assert any(place in answer for place in ("北京", "西安", "成都", "杭州", "桂林", "上海", "云南", "丽江")), (
            answer
        )
    assert "你好" in ask(client, "你好", stream=False)


def test_streamed_text_equals_plain_text_alone_and_in_company(client: openai.OpenAI) -> None:
    settings = [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.95, "seed": 17}]
    alone = {}
    for number, options in enumerate(settings):
        for question in QUESTIONS:
            plain = ask(client, question, stream=False, **options)
            # The second time the prompt's blocks come from the prefix cache.
            assert ask(client, question, stream=True, **options) == plain
            alone[question, number] = plain

    def in_company(index: int) -> bool:
        question, number = QUESTIONS[index % len(QUESTIONS)], index % 2
        answer = ask(client, question, stream=index % 3 == 0, **settings[number])
        return answer == alone[question, number]

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(in_company, range(96)))


def test_completions_take_text_and_ids_and_many_prompts(client: openai.OpenAI) -> None:
    options: dict = {"model": "shoal-tiny", "max_tokens": 12, "temperature": 0.0}
    texts = [client.completions.create(prompt=prompt, **options).choices[0].text for prompt in ("Hello", "2 + 2 =")]
    both = client.completions.create(prompt=["Hello", "2 + 2 ="], **options)
    assert [choice.text for choice in both.choices] == texts
    echoed = client.completions.create(prompt="Hello", echo=True, logprobs=2, **options)
    assert echoed.choices[0].text == "Hello" + texts[0]
    assert echoed.choices[0].logprobs is not None and echoed.choices[0].logprobs.token_logprobs is not None
    several = client.completions.create(prompt="Hello", n=3, seed=5, **{**options, "temperature": 1.0})
    assert len(several.choices) == 3
    again = client.completions.create(prompt="Hello", n=3, seed=5, **{**options, "temperature": 1.0})
    assert [choice.text for choice in again.choices] == [choice.text for choice in several.choices]


def test_stop_strings_and_special_tokens_end_an_answer(client: openai.OpenAI) -> None:
    whole = ask(client, QUESTIONS[0], stream=False)
    cut = whole[len(whole) // 2 : len(whole) // 2 + 2]
    for stream in (False, True):
        assert ask(client, QUESTIONS[0], stream=stream, stop=[cut]) == whole[: whole.index(cut)]
    stopped = client.chat.completions.create(
        model="shoal-tiny", messages=[{"role": "user", "content": "你好"}], temperature=0.0, stop=["<|im_end|>"]
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert "<|im_end|>" not in (stopped.choices[0].message.content or "")


def test_the_server_lives_on_after_bad_requests(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="8192"):
        ask(client, "long " * 9000, stream=False)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(client, "hot", stream=False, temperature=-1.0)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "hi"}])
    assert ask(client, "What is 12 + 30?", stream=False).strip()


def test_a_stream_that_is_cut_off_goes_on_with_the_same_tokens(server: str) -> None:
    """As a router has it: with the drawn seed, penalties over what was said, and log-probabilities."""
    body = {
        "model": "shoal-tiny", "messages": [{"role": "user", "content": QUESTIONS[0]}], "max_tokens": 60, "n": 2,
        "temperature": 0.9, "frequency_penalty": 0.5, "logprobs": True, "top_logprobs": 2, "stream": True,
        "stop": ["上海", "北京市"], "return_token_ids": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    with httpx.Client(base_url=server, trust_env=False, timeout=60) as http:
        expected = http.post("/v1/chat/completions", json={**body, "seed": 7}, headers={"x-request-id": "r"}).content
        for sizes in ((3000, 6000), (900, 20_000), (1, 11_111, 5000)):
            journal, limits = Journal(first_request("/v1/chat/completions", body)), [*sizes, 1 << 30]
            while journal.end is None:
                limit, data = limits.pop(0), b""
                request = {"content": encode_request(journal.request), "headers": {"content-type": REQUEST_MEDIA_TYPE}}
                with http.stream("POST", PATH, **request) as response:
                    for part in response.iter_raw():
                        data += part
                        if len(data) >= limit:
                            break
                journal.read(data[:limit])
            assert isinstance(journal.end, Finished)
            assert joined(journal.data, cached=False) == joined(expected, cached=False)
