"""Requests cut off at any frame and gone on elsewhere, by hand and without a router: clients get the same."""

from __future__ import annotations

import asyncio
import json
import random

import aiohttp
import pytest

from shoal.protocol import internal
from shoal.protocol.internal import Accepted, AnswerJournal, ContinueRequest, Failed, Finished, FrameReader, Progress
from tests.chaos.cases import Case, make_cases
from tests.chaos.client import AnswerFold, difference
from tests.chaos.harness import undisturbed
from tests.router.fakes.process import FakeProcess, fake_servers

HEADERS = {"content-type": internal.REQUEST_MEDIA_TYPE}


@pytest.fixture(scope="module")
def servers():
    with fake_servers("native", "native", tokens_per_second=1000) as servers:
        yield servers


class Carrier:
    """One request on its way over several servers, as a router carries it."""

    def __init__(self, case: Case, seed: int) -> None:
        body = case.marked("chaos-by-hand")
        self.request = ContinueRequest(
            version=1, path=case.path, body=body, request_id=f"case-{case.number}", seed=seed, created=1_700_000_000
        )
        self.delivered = b""
        self.finished: Finished | None = None
        self._answers: dict[int, AnswerJournal] = {}

    async def go(self, http: aiohttp.ClientSession, url: str, num_frames: int | None) -> None:
        """Go on there, until so many frames of news have come or the end."""
        data = internal.encode_request(self.request)
        reader = FrameReader()
        async with http.post(url + internal.PATH, data=data, headers=HEADERS) as response:
            assert response.status == 200, await response.text()
            async for piece in response.content.iter_any():
                for event in reader.feed(piece):
                    if num_frames == 0:  # it came, but was not read: another server says it again
                        break
                    if self._take(event) and num_frames is not None:
                        num_frames -= 1
                if self.finished is not None or num_frames == 0:
                    break
        self.request.answers = list(self._answers.values())

    def _take(self, event: internal.InternalEvent) -> bool:
        match event:
            case Accepted(prompts):
                assert self.request.prompts in (None, prompts)
                self.request.prompts = prompts
            case Progress():
                self._answers.setdefault(event.index, AnswerJournal(index=event.index)).add(event)
                self.delivered += event.data
                return True
            case Finished(data):
                self.delivered += data
                self.finished = event
            case Failed():
                pytest.fail(f"{event}")
        return False

    def content(self) -> dict:
        fold = AnswerFold()
        if self.request.body and not json.loads(self.request.body).get("stream"):
            fold.add(json.loads(self.delivered))
            return fold.content()
        events = self.delivered.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        for event in events[:-2]:
            fold.add(json.loads(event.removeprefix("data: ")))
        return fold.content()


async def carry(http: aiohttp.ClientSession, servers: list[FakeProcess], case: Case, rng: random.Random) -> Carrier:
    carrier = Carrier(case, seed=rng.randrange(2**31))
    cuts = [rng.randrange(12) for _ in range(rng.randint(1, 4))]
    for turn, num_frames in enumerate([*cuts, None]):
        await carrier.go(http, servers[turn % len(servers)].url, num_frames)
        if carrier.finished is not None:
            break
    return carrier


@pytest.mark.parametrize("seed", range(3))
async def test_what_is_cut_and_gone_on_with_equals_the_undisturbed_answer(servers, seed):
    cases = make_cases("fake", 40, seed)
    rng = random.Random(seed)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as http:
        wanted = await undisturbed(http, servers[0].url, cases, 16)
        slots = asyncio.Semaphore(16)

        async def check(case: Case) -> str | None:
            async with slots:
                carrier = await carry(http, servers, case, random.Random(rng.random()))
            found = difference(carrier.content(), wanted[case.number])
            usage = wanted[case.number]["usage"]
            if found is None and usage is not None and carrier.finished is not None:
                counts = (carrier.finished.num_prompt_tokens, carrier.finished.num_tokens)
                assert counts == (usage["prompt_tokens"], usage["completion_tokens"])
            return f"case {case.number} {case.body}: {found}" if found else None

        wrong = [found for found in await asyncio.gather(*map(check, cases)) if found]
    assert not wrong, "\n".join(wrong)


async def test_an_answer_that_has_ended_is_not_computed_again(servers):
    case = Case(0, "/v1/completions", {"model": "fake", "prompt": "x", "max_tokens": 5, "stream": True, "n": 2})
    async with aiohttp.ClientSession() as http:
        carrier = Carrier(case, seed=1)
        await carrier.go(http, servers[0].url, 10**6)
        carrier.finished = None
        before = servers[1].state()["num_tokens"]
        await carrier.go(http, servers[1].url, None)
        assert carrier.finished is not None and servers[1].state()["num_tokens"] == before
