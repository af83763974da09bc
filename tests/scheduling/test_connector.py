"""The scheduler with KV cache that comes from outside and leaves: right outputs, no block lost, nothing stuck."""

from __future__ import annotations

import random
import zlib
from array import array

import pytest

from shoal.scheduling import Scheduler, SchedulerConfig
from shoal.types import EngineRequest, FinishReason
from tests.scheduling.simulated_worker import VOCAB_SIZE, SimulatedWorker
from tests.scheduling.test_scheduler import Harness, expected_output, make_config, make_request


class SimulatedConnector:
    """Writes into the worker's cells as a transfer would: at any later time, also after the request was aborted."""

    def __init__(self, worker: SimulatedWorker, generator: random.Random, *, match_all: bool) -> None:
        self.worker = worker
        self.generator = generator
        self.match_all = match_all
        self.num_local: dict[str, int] = {}
        self.loading: dict[str, tuple[int, EngineRequest, list[int], int]] = {}
        self.sending: dict[str, int] = {}

    def num_matched_tokens(self, request: EngineRequest, num_local_tokens: int) -> tuple[int, bool]:
        self.num_local[request.request_id] = num_local_tokens
        choice = zlib.crc32(request.request_id.encode())  # the same whenever it is asked
        num_left = len(request.prompt_token_ids) - num_local_tokens
        if choice % 3 == 0 or num_left <= 0:
            return 0, False
        return num_left if self.match_all else choice // 16 % (num_left + 1), choice // 512 % 3 > 0

    def update_after_allocation(self, request: EngineRequest, block_ids: list[int], num_external_tokens: int) -> None:
        choice = zlib.crc32(request.request_id.encode())
        num_loaded = self.num_local[request.request_id] + num_external_tokens
        assert num_external_tokens > 0 and num_loaded <= len(request.prompt_token_ids)
        if choice // 512 % 3 > 0:
            self.loading[request.request_id] = (self.generator.randrange(6), request, block_ids, num_loaded)
        else:
            self._load(request, block_ids, num_loaded)

    def _load(self, request: EngineRequest, block_ids: list[int], num_loaded: int) -> None:
        size = self.worker.block_size
        for position in range(self.num_local[request.request_id], num_loaded):
            history = zlib.crc32(array("q", request.prompt_token_ids[: position + 1]).tobytes())
            self.worker.cells[block_ids[position // size], position % size] = history

    def delay_free(self, request_id: str, block_ids: list[int]) -> bool:
        delayed = self.generator.random() < 0.4
        if delayed:
            self.sending[request_id] = self.generator.randrange(6)
        return delayed

    def finished_loading(self) -> list[str]:
        arrived = []
        for request_id, (num_calls, request, block_ids, num_loaded) in list(self.loading.items()):
            self.loading[request_id] = (num_calls - 1, request, block_ids, num_loaded)
            if num_calls == 0:
                self._load(request, block_ids, num_loaded)
                del self.loading[request_id]
                arrived.append(request_id)
        return arrived

    def finished_sending(self) -> list[str]:
        sent = [request_id for request_id, num_calls in self.sending.items() if num_calls == 0]
        self.sending = {request_id: num - 1 for request_id, num in self.sending.items() if num > 0}
        return sent


class ConnectedHarness(Harness):
    """A step may have nothing to do but to wait for a transfer."""

    def __init__(self, config: SchedulerConfig, depth: int, generator: random.Random, *, match_all: bool) -> None:
        super().__init__(config, depth)
        self.connector = SimulatedConnector(self.worker, generator, match_all=match_all)
        self.scheduler = Scheduler(config, self.connector)

    def run_all(self) -> None:
        num_idle = 0
        while self.scheduler.has_work():
            num_idle = 0 if self.step() else num_idle + 1
            assert num_idle < 20, "nothing runs any more"
            self.scheduler.pool.check()
        self.check_empty()


@pytest.mark.parametrize("match_all", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_transfers_change_no_output_and_lose_no_block(seed: int, match_all: bool) -> None:
    generator = random.Random(seed)
    config = make_config(
        num_blocks=generator.randint(17, 40),
        max_num_seqs=generator.randint(1, 8),
        max_num_batched_tokens=generator.randint(8, 40),
        by_priority=generator.random() < 0.5,
        enable_prefix_caching=generator.random() < 0.6,
    )
    harness = ConnectedHarness(config, generator.randint(1, 3), generator, match_all=match_all)
    requests = []
    for index in range(generator.randint(5, 24)):
        family, length = generator.randrange(4), generator.randint(1, 40)
        prompt = [(family * 11 + j) % VOCAB_SIZE for j in range(length)]
        requests.append(make_request(f"r{seed}-{index}", prompt, max_tokens=generator.randint(1, 24)))
        requests[-1].priority = generator.randrange(3)
    for request in requests:
        harness.add(request)
        for _ in range(generator.randrange(3)):
            harness.step()
        if generator.random() < 0.3:
            harness.take(harness.scheduler.abort([generator.choice(requests).request_id]))
    harness.run_all()
    for request in requests:
        output, reason = expected_output(request, config.max_model_len)
        got, endings = harness.outputs[request.request_id], harness.endings[request.request_id]
        if endings == [FinishReason.ABORT]:
            assert got == output[: len(got)]
        else:
            assert (got, endings) == (output, [reason])


def test_an_id_whose_blocks_are_still_sent_is_refused() -> None:
    harness = ConnectedHarness(make_config(), 1, random.Random(0), match_all=False)
    harness.connector.num_matched_tokens = lambda request, num_local: (0, False)  # type: ignore[method-assign]
    harness.connector.delay_free = lambda request_id, block_ids: True  # type: ignore[method-assign]
    harness.add(make_request("r", [1, 2, 3], max_tokens=1))
    harness.step()
    num_free = harness.scheduler.pool.num_free
    assert num_free < harness.scheduler.pool.num_usable and harness.scheduler.has_work()
    harness.scheduler.add(make_request("r", [1, 2, 3], max_tokens=1))
    [refused] = harness.scheduler.take_early_deltas()
    assert refused.finish_reason is FinishReason.ERROR and "transfer" in str(refused.error)
    harness.connector.sending["r"] = 0
    harness.run_all()
