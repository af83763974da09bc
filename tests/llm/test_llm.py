"""LLM over a fake core: shapes in and out, where it may be called from, and its end."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shoal.engine.tokenizer import Tokenizer
from shoal.errors import ConfigError, EngineDeadError, InvalidRequestError, ModelError, StartupError
from shoal.llm import LLM
from shoal.llm.offline_engine import OfflineEngine
from shoal.messages import AddRequest
from shoal.types import EngineRequest, RequestOutput, SamplingParams
from tests.engine.fake_client import FakeClient, make_config
from tests.engine.tokenizers_for_tests import hugging_face, tokenizer

END = hugging_face("byte_level").convert_tokens_to_ids("<|im_end|>")


def echo(request: EngineRequest, position: int) -> int:
    """The prompt again, then the end."""
    prompt = request.prompt_token_ids
    return prompt[position] if position < len(prompt) else END


def make_llm(
    script: Callable[[EngineRequest, int], int] = echo,
    load: Callable[[], Tokenizer | None] = tokenizer,
    clients: list[FakeClient] | None = None,
) -> LLM:
    config = make_config()

    def make_client() -> FakeClient:
        client = FakeClient(config, script)
        if clients is not None:
            clients.append(client)
        return client

    return LLM.over(OfflineEngine(config, make_client, load), config)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with make_llm() as llm:
        yield llm


LONG = SamplingParams(max_tokens=60)


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_prompts_of_every_shape(llm: LLM) -> None:
    ids = tokenizer().encode("fox")
    for prompt in ("fox", ids, {"prompt": "fox"}, {"prompt_token_ids": ids}):
        for prompts in (prompt, [prompt]):
            [output] = llm.generate(prompts, LONG, use_tqdm=False)
            assert output.prompt_token_ids == ids
            assert output.outputs[0].text == "fox"
            assert output.outputs[0].token_ids == [*ids, END]
            assert output.outputs[0].finish_reason == "stop"
            assert output.finished
    assert llm.generate([], LONG) == []


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["x" * (40 - index) for index in range(20)]  # the later ones finish first
    assert texts(llm.generate(prompts, LONG, use_tqdm=False)) == prompts


def test_parameters_for_all_or_one_each(llm: LLM) -> None:
    short = SamplingParams(max_tokens=1)
    outputs = llm.generate(["fox dog", "fox dog"], [short, LONG], use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, len(tokenizer().encode("fox dog")) + 1]
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "stop"]
    default = llm.generate("the quick brown fox jumps over the lazy dog " * 2, use_tqdm=False)
    assert len(default[0].outputs[0].token_ids) == 16


def test_answers_and_logprobs(llm: LLM) -> None:
    [output] = llm.generate("fox", SamplingParams(n=2, logprobs=1, prompt_logprobs=0, max_tokens=9), use_tqdm=False)
    assert [answer.index for answer in output.outputs] == [0, 1]
    logprobs = output.outputs[1].logprobs
    assert logprobs is not None and logprobs[0][output.prompt_token_ids[0]].logprob == -0.5
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None


def test_priorities_reach_the_engine() -> None:
    clients: list[FakeClient] = []
    with make_llm(clients=clients) as llm:
        llm.generate(["a", "b"], LONG, use_tqdm=False, priority=[5, -1])
        with pytest.raises(InvalidRequestError, match="1 priorities for 2 prompts"):
            llm.generate(["a", "b"], LONG, use_tqdm=False, priority=[5])
    added = [message.request.priority for message in clients[0].sent if isinstance(message, AddRequest)]
    assert sorted(added) == [-1, 5]


def test_one_chat_or_many(llm: LLM) -> None:
    hello = [{"role": "user", "content": "你好"}]
    rendered = "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    [output] = llm.chat(hello, LONG, use_tqdm=False)
    assert output.prompt == rendered
    outputs = llm.chat([hello, [{"role": "user", "content": "fox"}]], LONG, use_tqdm=False)
    assert [output.prompt for output in outputs] == [rendered, rendered.replace("你好", "fox")]
    [output] = llm.chat(hello, LONG, use_tqdm=False, chat_template="{{ messages[0].content }}")
    assert output.prompt == "你好"


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        (["fox", "", "dog"], LONG, "prompt 1 of 3: the prompt is empty"),
        ([[5], [9999]], LONG, "prompt 1 of 2: the prompt holds 9999"),
        (17, LONG, "prompts must be a prompt or a list of prompts"),
        (["fox"], [LONG, LONG], "2 sampling_params for 1 prompts"),
        (["fox"], {"max_tokens": 5}, "must be SamplingParams or a list of them"),
    ],
)
def test_wrong_calls_run_nothing(prompts: Any, params: Any, words: str) -> None:
    clients: list[FakeClient] = []
    with make_llm(clients=clients) as llm, pytest.raises(InvalidRequestError, match=words):
        llm.generate(prompts, params, use_tqdm=False)
    assert not clients[0].sent


def test_without_a_tokenizer() -> None:
    with make_llm(load=lambda: None) as llm:
        [output] = llm.generate([[5, 6]], SamplingParams(max_tokens=2), use_tqdm=False)
        assert (output.outputs[0].token_ids, output.outputs[0].text) == ([5, 6], "")
        with pytest.raises(InvalidRequestError, match="skip_tokenizer_init"):
            llm.get_tokenizer()
        with pytest.raises(InvalidRequestError, match="needs a tokenizer"):
            llm.generate("fox")


def test_the_tokenizer_and_the_defaults(llm: LLM) -> None:
    assert llm.get_tokenizer().encode("fox") == tokenizer().encode("fox")
    assert llm.get_default_sampling_params() == SamplingParams()


# --- where it is called from -----------------------------------------------------------------------------------------


async def test_it_works_while_an_event_loop_runs(llm: LLM) -> None:
    assert asyncio.get_running_loop().is_running()
    assert texts(llm.generate(["fox"], LONG, use_tqdm=False)) == ["fox"]


def test_it_works_from_several_threads(llm: LLM) -> None:
    results: dict[int, list[str]] = {}

    def work(index: int) -> None:
        results[index] = texts(llm.generate([f"fox {index}", f"dog {index}"], LONG, use_tqdm=False))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {index: [f"fox {index}", f"dog {index}"] for index in range(6)}


def test_the_progress_bar_goes_to_stderr(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate(["fox", "dog"], LONG)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "2/2" in captured.err and "tok/s out" in captured.err
    llm.generate(["fox", "dog"], LONG, use_tqdm=False)
    assert capfd.readouterr().err == ""


# --- its end ---------------------------------------------------------------------------------------------------------


def test_shutdown_ends_the_engine_and_the_thread() -> None:
    clients: list[FakeClient] = []
    before = threading.active_count()
    llm = make_llm(clients=clients)
    llm.shutdown()
    llm.shutdown()
    assert clients[0].closed
    assert threading.active_count() == before
    with pytest.raises(EngineDeadError, match="has been shut down"):
        llm.generate("fox")
    with pytest.raises(EngineDeadError, match="has been shut down"):
        llm.reset_prefix_cache()


def test_an_llm_that_is_forgotten_ends_its_engine() -> None:
    clients: list[FakeClient] = []
    llm = make_llm(clients=clients)
    del llm
    gc.collect()
    assert clients[0].closed


def test_shutdown_from_another_thread_ends_a_call_in_progress() -> None:
    clients: list[FakeClient] = []
    llm = make_llm(lambda request, position: 300, clients=clients)
    timer = threading.Timer(0.2, llm.shutdown)
    clients[0].gate.clear()
    timer.start()
    outputs = llm.generate(["fox", "dog"], LONG, use_tqdm=False)
    timer.join()
    assert [output.outputs[0].finish_reason for output in outputs] == ["abort", "abort"]


def test_a_dead_core_is_an_error_and_not_a_hang() -> None:
    clients: list[FakeClient] = []
    with make_llm(clients=clients) as llm:
        clients[0].die()
        with pytest.raises(EngineDeadError, match="signal 9"):
            llm.generate("fox", LONG, use_tqdm=False)
        with pytest.raises(EngineDeadError, match="signal 9"):
            llm.generate("fox", LONG, use_tqdm=False)


def test_ctrl_c_frees_the_requests_and_the_llm_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import concurrent.futures

    clients: list[FakeClient] = []
    with make_llm(clients=clients) as llm:
        client = clients[0]
        client.gate.clear()
        wait = concurrent.futures.wait

        def interrupted(*arguments: Any, **options: Any) -> Any:
            while len(client.running) < 2:
                pass
            raise KeyboardInterrupt

        monkeypatch.setattr(concurrent.futures, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["fox", "dog"], LONG, use_tqdm=False)
        monkeypatch.setattr(concurrent.futures, "wait", wait)
        assert not client.running
        llm._engine.submit(_open(client)).result(5)
        assert texts(llm.generate(["fox"], LONG, use_tqdm=False)) == ["fox"]


async def _open(client: FakeClient) -> None:
    client.gate.set()


class FailingClient(FakeClient):
    async def start(self, on_progress: Any = None) -> Any:
        raise StartupError("the engine core ended with exit code 1")


def test_what_goes_wrong_at_the_start_is_raised_and_leaves_nothing() -> None:
    before = threading.active_count()
    config = make_config()
    clients: list[FakeClient] = []

    def client(kind: type[FakeClient]) -> Callable[[], FakeClient]:
        def make() -> FakeClient:
            clients.append(kind(config))
            return clients[-1]

        return make

    def no_tokenizer() -> Tokenizer:
        raise ModelError("no tokenizer files")

    with pytest.raises(StartupError, match="exit code 1"):
        OfflineEngine(config, client(FailingClient), tokenizer)
    with pytest.raises(ModelError, match="no tokenizer files"):
        OfflineEngine(config, client(FakeClient), no_tokenizer)
    assert all(client.closed for client in clients)
    assert threading.active_count() == before


def test_wrong_arguments_fail_before_anything_starts(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        LLM(model=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="did you mean max_model_len"):
        LLM(model="shoal-tiny", max_model_length=5)
    with pytest.raises(ConfigError, match="max_num_seqs must be an integer"):
        LLM(model="shoal-tiny", max_num_seqs="many")


# --- import ----------------------------------------------------------------------------------------------------------


def test_importing_shoal_costs_nothing() -> None:
    program = (
        "import sys, json, shoal; names = [shoal.SamplingParams.__name__, shoal.RequestOutput.__name__];"
        "heavy = [name for name in ('torch', 'transformers', 'tokenizers', 'numpy') if name in sys.modules];"
        "llm = shoal.LLM.__name__;"
        "later = [name for name in ('torch', 'transformers') if name in sys.modules];"
        "print(json.dumps([names, heavy, llm, later, shoal.__version__]))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names, heavy, llm, later, version = json.loads(result.stdout)
    assert names == ["SamplingParams", "RequestOutput"]
    assert (heavy, llm, later) == ([], "LLM", [])
    assert version
