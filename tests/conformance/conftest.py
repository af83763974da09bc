from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import openai
import pytest

from tests.conformance.targets import KEY, TARGETS, Target, targets, why_skipped


@pytest.fixture(scope="session")
def all_targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    with targets(tmp_path_factory.mktemp("conformance")) as found:
        yield found


@pytest.fixture(scope="session", params=TARGETS)
def target(request: pytest.FixtureRequest, all_targets: dict[str, Target]) -> Target:
    return all_targets[request.param]


@pytest.fixture(autouse=True)
def skip_what_a_target_lacks(request: pytest.FixtureRequest) -> None:
    if "target" in request.fixturenames:
        why = why_skipped(request.function, request.getfixturevalue("target").name)
        if why is not None:
            pytest.skip(why)


@pytest.fixture(scope="session")
def client(target: Target) -> Iterator[openai.OpenAI]:
    """The official client, as users make it."""
    with openai.OpenAI(base_url=f"{target.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
async def async_client(target: Target) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{target.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def http(target: Target) -> Iterator[httpx.Client]:
    """What the official client does not show."""
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=target.url, headers=headers, trust_env=False, timeout=60) as http:
        yield http
