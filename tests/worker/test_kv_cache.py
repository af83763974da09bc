"""How much memory a rank takes for KV cache, and which devices and threads it takes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shoal.config.engine_config import EngineConfig
from shoal.config.resolve import make_engine_config
from shoal.errors import ConfigError
from shoal.worker.device import find_device, share_cores
from shoal.worker.kv_cache import memory_budget, num_blocks_for
from shoal.worker.worker import Worker
from tests.checkpoints import make_checkpoint

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    path = make_checkpoint(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=3)
    return make_engine_config(model=str(path), dtype="float32", device="cpu", max_model_len=128, max_num_seqs=8)


def test_a_rank_takes_half_of_its_part_at_most(config: EngineConfig) -> None:
    assert memory_budget(config, 100 * MIB, CPU, 900 * MIB)[0] == 400 * MIB
    assert memory_budget(config, 300 * MIB, CPU, 9000 * MIB)[0] == 600 * MIB
    assert memory_budget(config, 100 * MIB, CPU, 50 * MIB)[0] == 0
    explicit = dataclasses.replace(config, kv_cache_memory=500 * MIB)
    assert memory_budget(explicit, 100 * MIB, CPU, 600 * MIB)[0] == 500 * MIB
    with pytest.raises(ConfigError, match="asks for 500 MiB, 499 MiB are free for each rank"):
        memory_budget(explicit, 100 * MIB, CPU, 599 * MIB)


def test_blocks(config: EngineConfig) -> None:
    enough = 9000 * MIB
    assert num_blocks_for(dataclasses.replace(config, num_blocks_override=7), MIB, 0, CPU, 0) == 7
    assert num_blocks_for(config, MIB, 0, CPU, enough) == 8 * 128 // config.block_size + 1, "no more than can be used"
    with pytest.raises(ConfigError, match="one request of max_model_len 128 needs .* --max-model-len to"):
        num_blocks_for(config, 100 * MIB, 0, CPU, enough)


def test_ranks_of_one_host_share_its_memory(config: EngineConfig) -> None:
    greedy = dataclasses.replace(config, kv_cache_memory=1 << 50)
    for local_size in (1, 1000):
        with pytest.raises(ConfigError, match="MiB are free for each rank") as error:
            Worker(greedy, local_size=local_size).load(lambda _: None)
        free = int(str(error.value).split()[-7])
        if local_size == 1:
            most = free
        else:
            assert free < most / 100


def test_one_worker_loads_and_allocates_what_it_is_told(config: EngineConfig) -> None:
    worker = Worker(config)
    num_blocks, facts = worker.load(lambda _: None)
    assert num_blocks == 8 * 128 // config.block_size + 1
    assert facts["weight_bytes"] > 0 and facts["dtype"] == "float32" and facts["load_seconds"] >= 0
    facts = worker.allocate(num_blocks - 2, lambda _: None)
    assert facts["num_blocks"] == num_blocks - 2
    caches = worker.runner.kv_caches
    assert len(caches) == 3 and facts["kv_cache_bytes"] == sum(cache.nbytes for cache in caches)
    worker.idle()
    worker.shutdown()


@pytest.mark.parametrize("name", ["fp8", "fp8_e5m2"])
def test_8_bits_hold_more_tokens(config: EngineConfig, name: str) -> None:
    """Four times as many as of fp32; and a step runs with them."""
    cramped = dataclasses.replace(config, kv_cache_memory=3 * MIB // 2, max_num_seqs=1000)
    plain, _ = Worker(cramped).load(lambda _: None)
    worker = Worker(dataclasses.replace(cramped, kv_cache_dtype=name))
    num_blocks, _ = worker.load(lambda _: None)
    assert num_blocks // 4 == plain
    facts = worker.allocate(num_blocks, lambda _: None)
    assert facts["kv_cache_dtype"] == ("float8_e4m3fn" if name == "fp8" else "float8_e5m2")
    assert facts["kv_cache_tokens"] == (num_blocks - 1) * config.block_size
    assert facts["kv_cache_bytes"] == sum(cache.nbytes for cache in worker.runner.kv_caches) <= 3 * MIB // 2
    worker.shutdown()


def test_latents_are_held_once_whatever_the_heads(config: EngineConfig) -> None:
    worker = Worker(config)
    worker.load(lambda _: None)
    assert worker._cache_shape(5)[1:3] == (worker.config.model.num_kv_heads, 5)
    worker.config = dataclasses.replace(config, model=dataclasses.replace(config.model, latent_cache_dim=40))
    assert worker._cache_shape(5) == (5, config.block_size, 40)
    worker.shutdown()


def test_threads_are_shared_unless_they_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
        share_cores(4)
        assert torch.get_num_threads() == 8
        monkeypatch.delenv("OMP_NUM_THREADS")
        share_cores(3)
        assert torch.get_num_threads() == 2
        share_cores(100)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_device_that_is_not_there() -> None:
    assert find_device("cpu", 3) == CPU
    number = torch.cuda.device_count()
    expected = (
        f"GPU number {number} is wanted and this process sees {number}" if number else "torch finds no usable GPU"
    )
    with pytest.raises(ConfigError, match=expected):
        find_device("cuda", number)
