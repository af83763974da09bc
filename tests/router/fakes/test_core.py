"""What the fake core says, and how it models a real one: the chaos tests believe it."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import EngineDeadError
from shoal.messages import AbortRequests, AddRequest
from shoal.types import EngineRequest, FinishReason, SamplingParams
from tests.router.fakes.core import BLOCK_SIZE, Pace, PacedCore, core_config
from tests.router.fakes.vocabulary import DEADLY, END, encode_text, small_tokenizer

FAST = Pace(tokens_per_second=100_000, prompt_tokens_per_second=1e9)


def make(pace: Pace = FAST) -> PacedCore:
    return PacedCore(core_config(pace), pace)


def request(name: str, prompt: list[int], emitted: tuple[int, ...] = (), **sampling) -> AddRequest:
    params = SamplingParams(**{"max_tokens": 40, "temperature": 0.0, **sampling})
    return AddRequest(EngineRequest(name, prompt, params, list(emitted)))


async def answer(core: PacedCore, *requests: AddRequest) -> dict[str, list[int]]:
    """The ids of each request, until all have ended."""
    for one in requests:
        await core.send(one)
    ids: dict[str, list[int]] = {one.request.request_id: [] for one in requests}
    num_open = len(ids)
    while num_open:
        for delta in (await core.receive()).deltas:
            ids[delta.request_id] += delta.token_ids
            num_open -= delta.finish_reason is not None
    return ids


PROMPT = encode_text("what comes next?")


async def test_a_continuation_says_the_rest():
    whole = (await answer(make(), request("a", PROMPT, seed=3, temperature=0.7)))["a"]
    for cut in (1, 5, len(whole) - 1):
        rest = (await answer(make(), request("a", PROMPT, tuple(whole[:cut]), seed=3, temperature=0.7)))["a"]
        assert whole[:cut] + rest == whole


async def test_a_token_that_comes_twice_or_is_missing_changes_what_follows():
    whole = (await answer(make(), request("a", PROMPT, ignore_eos=True)))["a"]
    twice, missing = [*whole[:5], whole[4]], whole[:4]
    for wrong in (twice, [*missing, *whole[5:7]]):
        rest = (await answer(make(), request("a", PROMPT, tuple(wrong), ignore_eos=True)))["a"]
        assert (wrong + rest)[8:40] != whole[8:40]


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"temperature": 0.5}, {"presence_penalty": 1.0}, {"top_p": 0.5}], ids=str
)
async def test_parameters_change_the_text(change):
    given = {"seed": 1, "temperature": 1.0}
    first = await answer(make(), request("a", PROMPT, **given))
    second = await answer(make(), request("a", PROMPT, **{**given, **change}))
    assert first != second


async def test_greedy_requests_ignore_the_seed_and_neighbours():
    alone = await answer(make(), request("a", PROMPT))
    among = await answer(make(), request("a", PROMPT, seed=9), request("b", PROMPT[:5]), request("c", [300]))
    assert alone["a"] == among["a"]


async def test_answers_end_by_length_and_by_the_end_token():
    ends = set()
    core = make()
    for number in range(12):
        await core.send(request(f"{number}", [300 + number], max_tokens=150, eos_token_ids=[END]))
    while core.running or core.waiting:
        ends |= {delta.finish_reason for delta in (await core.receive()).deltas}
    assert ends == {None, FinishReason.STOP, FinishReason.LENGTH}


async def test_blocks_are_in_use_while_requests_run_and_free_afterwards():
    core = make()
    await core.send(request("a", [300] * 40, max_tokens=2))
    first, second = await core.receive(), await core.receive()
    assert first.stats.kv_cache_usage == 3 / FAST.num_blocks and first.stats.num_requests_running == 1
    assert second.stats.kv_cache_usage == 0 and second.stats.num_free_blocks == FAST.num_blocks
    await core.send(request("b", [300] * 40, max_tokens=20))
    await core.receive()
    await core.send(AbortRequests(["b"], silent=True))
    assert (await asyncio.wait_for(core.receive(), 5)).stats.kv_cache_usage == 0


async def test_slots_are_limited_and_prefixes_are_cached():
    pace = Pace(tokens_per_second=100_000, prompt_tokens_per_second=1e9, max_num_seqs=2)
    core = make(pace)
    prompt = [300] * (2 * BLOCK_SIZE + 3)
    for name in "abc":
        await core.send(request(name, prompt, max_tokens=3, ignore_eos=True))
    first = await core.receive()
    assert {delta.request_id: delta.num_cached_tokens for delta in first.deltas} == {"a": 0, "b": 2 * BLOCK_SIZE}
    assert first.stats.num_requests_waiting == 1


async def test_phases_spread_the_tokens_and_times_are_kept():
    core = make(dataclasses.replace(FAST, num_phases=2, records_times=True))
    for name in "ab":
        await core.send(request(name, PROMPT, max_tokens=3, ignore_eos=True))
    rounds = [[delta.request_id for delta in (await core.receive()).deltas] for _ in range(6)]
    assert sorted(rounds) == [["a"]] * 3 + [["b"]] * 3 and rounds[0] != rounds[1]
    assert {name: len(times) for name, times in core.token_times.items()} == {"a": 3, "b": 3}


async def test_a_frozen_core_makes_no_step_and_a_dead_one_says_so():
    core = make()
    core.freeze()
    await core.send(request("a", PROMPT))
    step = asyncio.create_task(core.receive())
    await asyncio.sleep(0.05)
    assert not step.done()
    core.thaw()
    assert (await step).deltas
    core.die()
    with pytest.raises(EngineDeadError):
        await core.receive()


async def test_a_query_of_death_ends_the_engine_that_computes_it():
    core = make()
    await core.send(request("a", encode_text(f"one {DEADLY}")))
    with pytest.raises(EngineDeadError, match="signal 11"):
        await core.receive()


TEXTS = st.text(st.sampled_from("abc XYZ\n的一龘€😀ж") | st.characters(exclude_categories=["Cs"]), max_size=40)


@given(TEXTS)
def test_text_and_ids_map_to_each_other(text):
    ids = encode_text(text)
    assert small_tokenizer().decode(ids) == text
    assert encode_text(small_tokenizer().decode(ids)) == ids


@settings(max_examples=20)
@given(st.integers(0, 2**64))
def test_what_is_said_reads_back_as_the_same_ids(seed):
    """So a server that goes on from the text meets the ids that were said."""
    ids = asyncio.run(answer(make(), request("a", [300], seed=seed, temperature=1.0, max_tokens=60)))["a"]
    said = [id_ for id_ in ids if id_ >= 4]
    text = small_tokenizer().decode(said)
    whole = text.rstrip("\ufffd")
    assert encode_text(whole) == said[: len(encode_text(whole))]
    assert len(text) - len(whole) <= 3
