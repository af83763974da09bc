"""LLM and AsyncEngine over a real engine core: a small model with random weights, in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from shoal.config.resolve import make_engine_config
from shoal.engine.async_engine import AsyncEngine
from shoal.engine.client import SubprocessClient
from shoal.engine.journal import Fold
from shoal.engine.tokenizer import load_tokenizer
from shoal.errors import InvalidRequestError
from shoal.llm import LLM
from shoal.messages import AddRequest
from shoal.types import FinishReason, RequestUpdate, SamplingParams
from tests.engine.tokenizers_for_tests import save

OPTIONS = dict(device="cpu", load_format="dummy", max_model_len=256, kv_cache_memory="16MiB", deterministic=True)
TEXT = SamplingParams(temperature=1.0, seed=5, max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    save("byte_level", directory)
    config = dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=502, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        rms_norm_eps=1e-6, rope_theta=10000.0, hidden_act="silu", tie_word_embeddings=True, dtype="float32",
        eos_token_id=0,
    )  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


@pytest.fixture(scope="module")
def llm(model: str) -> Iterator[LLM]:
    with LLM(model=model, **OPTIONS) as llm:
        yield llm


@contextlib.asynccontextmanager
async def running(model: str) -> AsyncIterator[tuple[AsyncEngine, SubprocessClient]]:
    config = make_engine_config(model=model, **OPTIONS)
    client = SubprocessClient(config)
    await client.start()
    engine = AsyncEngine(client, config, load_tokenizer(model))
    await engine.start()
    try:
        yield engine, client
    finally:
        await engine.close()


# --- LLM -------------------------------------------------------------------------------------------------------------


def test_the_same_text_alone_and_in_company(llm: LLM) -> None:
    alone = llm.generate("The fox", TEXT, use_tqdm=False)[0].outputs[0]
    assert len(alone.token_ids) == 60 and alone.finish_reason == "length"
    assert alone.text == llm.get_tokenizer().decode(alone.token_ids, skip_special_tokens=True)
    company = llm.generate([f"other {index}" for index in range(15)] + ["The fox"], TEXT, use_tqdm=False)
    assert company[-1].outputs[0] == alone
    assert len({output.outputs[0].text for output in company}) == 16


def test_a_stop_string_cuts_the_text_of_the_same_answer(llm: LLM) -> None:
    whole = llm.generate("The fox", TEXT, use_tqdm=False)[0].outputs[0]
    stop = whole.text[20:23]
    cut = llm.generate("The fox", TEXT.clone(stop=stop), use_tqdm=False)[0].outputs[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_a_special_token_as_stop_string(llm: LLM) -> None:
    start = llm.get_tokenizer().convert_tokens_to_ids("<|im_start|>")
    params = TEXT.clone(stop="<|im_start|>", logit_bias={start: 100.0}, min_tokens=4)
    answer = llm.generate("The fox", params, use_tqdm=False)[0].outputs[0]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", "<|im_start|>")
    assert len(answer.token_ids) == 5 and answer.token_ids[-1] == start


def test_answers_differ_and_repeat(llm: LLM) -> None:
    params = TEXT.clone(n=3, logprobs=2, prompt_logprobs=1)
    [first], [second] = (llm.generate("The fox", params, use_tqdm=False) for _ in range(2))
    assert len({answer.text for answer in first.outputs}) == 3
    assert first.outputs == second.outputs
    assert first.prompt_logprobs == second.prompt_logprobs
    assert first.prompt_logprobs is not None and len(first.prompt_logprobs) == len(first.prompt_token_ids)
    assert all(answer.logprobs is not None and len(answer.logprobs) == 60 for answer in first.outputs)


def test_a_prompt_that_is_too_long_touches_nothing_else(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="300 tokens; this model takes 256"):
        llm.generate([[5], [5] * 300], TEXT, use_tqdm=False)
    assert len(llm.generate([[5] * 250], TEXT, use_tqdm=False)[0].outputs[0].token_ids) == 6


# --- AsyncEngine -----------------------------------------------------------------------------------------------------


async def test_streams_and_readers_that_leave(model: str) -> None:
    async with running(model) as (engine, _):
        # Streamed equals not streamed.
        whole = (await engine.collect(engine.prepare("The fox", TEXT))).outputs[0]
        updates = [update async for update in engine.stream(engine.prepare("The fox", TEXT))]
        assert "".join(update.text for update in updates) == whole.text
        assert len(updates) > 20

        # Readers that leave give everything back.
        async def leave(after: int) -> None:
            async with contextlib.aclosing(engine.stream(engine.prepare("The fox", TEXT.clone(n=2)))) as stream:
                for _ in range(after):
                    await anext(stream)

        await asyncio.gather(*(leave(after) for after in range(12)))
        assert engine.num_unfinished == 0
        async with asyncio.timeout(10):
            while (stats := await engine.stats()).num_free_blocks < stats.num_blocks:  # a step may be in flight
                await asyncio.sleep(0.01)
        assert stats.num_requests_running + stats.num_requests_waiting == 0


async def test_a_continuation_says_what_the_undisturbed_request_says(model: str) -> None:
    async with running(model) as (engine, _):
        prepared = engine.prepare("The fox", TEXT)
        whole = (await engine.collect(prepared)).outputs[0]
    async with running(model) as (engine, client):
        await engine_stops_reading(engine)
        for cut in (1, 7, 59):
            journal = prepared.journal(0)
            journal.request_id = f"cut-{cut}"
            journal.emitted_token_ids = whole.token_ids[:cut]
            journal.delivered_characters = min(3, len(engine.tokenizer.decode(whole.token_ids[:cut])) // 2)
            text = whole.text[: journal.delivered_characters]
            await client.send(AddRequest(journal.engine_request()))
            fold, rest = Fold.replay(journal, engine.tokenizer)
            text += rest.text
            while True:
                [delta] = [d for d in (await client.receive()).deltas if d.request_id == journal.request_id] or [None]
                if delta is None:
                    continue
                text += fold.push(delta.token_ids, delta.finish_reason, delta.stop_reason).text
                if delta.finish_reason is not None:
                    break
            assert journal.emitted_token_ids == whole.token_ids
            assert text == whole.text


async def engine_stops_reading(engine: AsyncEngine) -> None:
    """From here on the test reads the client itself."""
    assert engine._pump_task is not None
    engine._pump_task.cancel()
    await asyncio.gather(engine._pump_task, return_exceptions=True)


async def test_a_killed_core_ends_every_stream_once(model: str) -> None:
    async with running(model) as (engine, client):

        async def read() -> list[RequestUpdate]:
            return [update async for update in engine.stream(engine.prepare("The fox", TEXT.clone(max_tokens=250)))]

        readers = [asyncio.create_task(read()) for _ in range(4)]
        async with asyncio.timeout(20):
            while engine.latest_stats.generation_tokens_total < 10:
                await asyncio.sleep(0.005)
        assert client.process_id is not None
        os.kill(client.process_id, signal.SIGKILL)
        for updates in await asyncio.wait_for(asyncio.gather(*readers), 10):
            assert [update.finish_reason for update in updates if update.finish_reason] == [FinishReason.ERROR]
            assert updates[-1].error is not None and "signal 9" in updates[-1].error
        assert not engine.alive


# --- a user's script -------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from shoal import LLM, SamplingParams

llm = LLM({model!r}, **{options!r})
print(json.dumps({{"core": llm._engine.engine._client.process_id}}), flush=True)
outputs = llm.generate(["The fox", "你好"], SamplingParams(temperature=0.8, top_p=0.95, max_tokens={max_tokens}))
print(json.dumps([output.outputs[0].text for output in outputs]))
"""


def start_script(path: Path, model: str, max_tokens: int, **options: object) -> tuple[subprocess.Popen[str], int]:
    path.write_text(SCRIPT.format(model=model, options=OPTIONS | options, max_tokens=max_tokens))
    process = subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return process, json.loads(line)["core"]


def test_a_script_without_a_main_guard(tmp_path: Path, model: str) -> None:
    process, core = start_script(tmp_path / "script.py", model, 20)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert all(json.loads(out))
    assert "2/2" in err
    assert not psutil.pid_exists(core), "it did not call shutdown, and nothing may stay behind all the same"


def test_ctrl_c_ends_a_script_and_its_core(tmp_path: Path, model: str) -> None:
    process, core = start_script(
        tmp_path / "script.py", model, 100_000, max_model_len=None, kv_cache_memory="64MiB", deterministic=False
    )
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in err
    assert not psutil.pid_exists(core)
