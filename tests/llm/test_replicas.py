"""LLM over two real engine cores: the same tokens as over one, and what is left when one of them dies."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable

import psutil
import pytest
import torch

from shoal.config.resolve import make_engine_config
from shoal.engine.replicas import ReplicatedClient
from shoal.errors import EngineError
from shoal.executor.uniproc import UniprocExecutor
from shoal.llm import LLM
from shoal.types import SamplingParams
from tests.checkpoints import make_checkpoint

OPTIONS = dict(device="cpu", max_model_len=128, num_gpu_blocks_override=200, skip_tokenizer_init=True)
PROMPTS = [[index + 1, 7, 2 * index + 5] for index in range(12)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), "qwen2"))


def generate(llm: LLM, params: SamplingParams) -> list[list[list[int]]]:
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


def replicated(llm: LLM) -> ReplicatedClient:
    client = llm._engine.engine._client
    assert isinstance(client, ReplicatedClient)
    return client


def test_two_replicas_give_the_tokens_of_one_and_one_may_die(checkpoint: str) -> None:
    sampled = SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=20, ignore_eos=True)
    with LLM(checkpoint, **OPTIONS) as llm:
        greedy, random = generate(llm, GREEDY), generate(llm, sampled)
    with LLM(checkpoint, data_parallel_size=2, **OPTIONS) as llm:
        assert generate(llm, GREEDY) == greedy
        assert generate(llm, sampled) == random
        llm.reset_prefix_cache()
        engine = llm._engine.engine
        assert [engine._stats[replica].generation_tokens_total for replica in (0, 1)] == [6 * 20 + 12 * 20] * 2
        assert engine.latest_stats.generation_tokens_total == 2 * (6 * 20 + 12 * 20)
        cores = [replica.client.process_id for replica in replicated(llm)._replicas]  # type: ignore[attr-defined]
        assert len(set(cores)) == 2 and all(psutil.pid_exists(core) for core in cores)
        # One of them dies in the middle of a call, which says so; the next call has no trouble.
        os.kill(cores[1], signal.SIGSTOP)  # its half of the requests waits there
        killer = threading.Thread(target=kill_when, args=(cores[1], lambda: engine.num_unfinished == 6))
        killer.start()
        with pytest.raises(EngineError, match="replica 1 is gone: .* signal 9"):
            generate(llm, GREEDY)
        killer.join()
        assert generate(llm, GREEDY) == greedy
        assert asyncio.run_coroutine_threadsafe(engine.stats(), llm._engine._loop).result(10).num_blocks == 199
    assert not any(psutil.pid_exists(core) for core in cores)


def test_replicas_of_two_ranks_give_the_same_tokens_and_one_may_lose_a_rank(checkpoint: str) -> None:
    with LLM(checkpoint, dtype="float32", **OPTIONS) as llm:
        greedy = generate(llm, GREEDY)
    with LLM(checkpoint, dtype="float32", data_parallel_size=2, tensor_parallel_size=2, **OPTIONS) as llm:
        assert generate(llm, GREEDY) == greedy
        assert replicated(llm).ready.info["ranks"] == 4
        cores = [psutil.Process(replica.client.process_id) for replica in replicated(llm)._replicas]  # type: ignore[attr-defined]
        workers = [core.children() for core in cores]
        assert [len(own) for own in workers] == [2, 2]
        workers[0][1].kill()
        engine = llm._engine.engine
        while engine.replicas[0].failure is None:
            time.sleep(0.01)
        assert "rank 1" in engine.replicas[0].failure
        assert generate(llm, GREEDY) == greedy
        psutil.wait_procs([cores[0], *workers[0]], timeout=20)
        assert not any(one.is_running() for one in (cores[0], *workers[0])), "its replica goes with it"
        assert all(one.is_running() for one in (cores[1], *workers[1]))
    _, alive = psutil.wait_procs([cores[1], *workers[1]], timeout=20)
    assert not alive


@pytest.mark.multigpu
def test_each_replica_has_a_gpu_of_its_own(checkpoint: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA GPUs")
    options = {**OPTIONS, "device": "cuda", "dtype": "float32"}
    with LLM(checkpoint, **options) as llm:
        greedy = generate(llm, GREEDY)
    free = [torch.cuda.mem_get_info(device)[0] for device in (0, 1)]
    with LLM(checkpoint, data_parallel_size=2, **options) as llm:
        assert generate(llm, GREEDY) == greedy
        used = [free[device] - torch.cuda.mem_get_info(device)[0] for device in (0, 1)]
    # A process that touches another one's GPU takes hundreds of MiB there.
    assert min(used) > 0 and abs(used[0] - used[1]) < 100 << 20, used


def kill_when(process_id: int, condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)
    os.kill(process_id, signal.SIGKILL)


def test_replicas_of_one_host_share_its_memory_and_take_a_device_each(checkpoint: str) -> None:
    config = make_engine_config(model=checkpoint, data_parallel_size=4, **OPTIONS)
    assert config.parallel.backend == "uni"
    third = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, data_rank=2))
    alone = make_engine_config(model=checkpoint, **OPTIONS)
    executors = [UniprocExecutor(third), UniprocExecutor(alone)]
    bytes_of_third, bytes_alone = (executor._worker._host_bytes for executor in executors)
    assert bytes_of_third < bytes_alone / 3
    assert [executor._worker._device_index for executor in executors] == [2, 0]
    for executor in executors:
        executor.shutdown()
