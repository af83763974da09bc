"""Which adapters are loaded: places, names, what is tried first, and what is taken back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from shoal.config.lora import LoraConfig
from shoal.engine.adapters import AdapterRegistry
from shoal.errors import InvalidRequestError, NotFoundError
from tests.config.test_lora import write


class Registry(AdapterRegistry):
    """used: ids that requests name."""

    def __init__(self, max_loras: int) -> None:
        self.used: set[str] = set()
        super().__init__(LoraConfig(max_loras=max_loras, max_rank=16), self.used.__contains__)


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    return [write(tmp_path / str(index)) for index in range(4)]


async def load(registry: Registry, name: str, path: str, *, replace: bool = False) -> None:
    async with registry.trying(name, path, replace=replace):
        pass


async def test_served_when_it_was_tried(paths: list[str]) -> None:
    registry = Registry(1)
    async with registry.trying("a", paths[0]) as adapter:
        assert registry.names == []
        with pytest.raises(InvalidRequestError, match="is being loaded now"):
            await load(registry, "a", paths[0])
        with pytest.raises(InvalidRequestError, match="all 1 places"):
            await load(registry, "b", paths[1])
    assert registry.find("a") == adapter
    with pytest.raises(InvalidRequestError, match="loaded already, from .*load_inplace"):
        await load(registry, "a", paths[1])


@pytest.mark.parametrize("max_loras", [1, 2])
async def test_what_cannot_be_used_leaves_everything_as_it_was(paths: list[str], max_loras: int) -> None:
    registry = Registry(max_loras)
    with pytest.raises(ZeroDivisionError):
        async with registry.trying("a", paths[0]):
            raise ZeroDivisionError
    assert registry.names == []
    await load(registry, "a", paths[0])
    before = registry.find("a")
    assert before is not None
    with pytest.raises(ZeroDivisionError):
        async with registry.trying("a", paths[1], replace=True) as adapter:
            assert (adapter.slot == before.slot) == (max_loras == 1)
            raise ZeroDivisionError
    after = registry.find("a")
    assert after is not None and after.path == before.path and after.slot == before.slot
    # Where the other one was tried in its place, the workers must load it again.
    assert (after.uid == before.uid) == (max_loras > 1)
    await load(registry, "a", paths[1], replace=True)
    replaced = registry.find("a")
    assert replaced is not None and replaced.path == paths[1]


async def test_a_place_is_free_when_its_requests_have_ended(paths: list[str]) -> None:
    registry = Registry(1)
    await load(registry, "a", paths[0])
    old = registry.find("a")
    assert old is not None
    registry.used.add(old.uid)
    with pytest.raises(InvalidRequestError, match="all 1 places"):
        await load(registry, "a", paths[1], replace=True)
    assert registry.find("a") == old
    registry.unload("a")
    with pytest.raises(InvalidRequestError, match="1 that still have requests"):
        await load(registry, "b", paths[1])
    registry.check_is_there(old)
    registry.used.clear()
    await load(registry, "b", paths[1])
    with pytest.raises(NotFoundError, match="was unloaded"):
        registry.check_is_there(old)
    with pytest.raises(NotFoundError, match="loaded: b"):
        registry.unload("a")


async def test_no_unload_comes_between(paths: list[str]) -> None:
    """It would say that there is none, and then there would be one."""
    registry = Registry(2)
    await load(registry, "a", paths[0])
    for name, replace in (("a", True), ("b", False)):
        async with registry.trying(name, paths[1], replace=replace):
            with pytest.raises(InvalidRequestError, match="is being loaded now"):
                registry.unload(name)
        registry.unload(name)
    assert registry.names == []


async def test_offline_one_that_cannot_be_read_costs_no_other_its_place(paths: list[str], tmp_path: Path) -> None:
    registry = Registry(1)
    registry.find_or_load([("a", paths[0])])
    with pytest.raises(InvalidRequestError):
        registry.find_or_load([("b", str(tmp_path / "none"))])
    assert registry.names == ["a"]


async def test_two_at_once_of_one_name(paths: list[str]) -> None:
    registry = Registry(4)
    results = await asyncio.gather(*(load(registry, "a", path, replace=True) for path in paths), return_exceptions=True)
    assert sum(result is None for result in results) >= 1
    assert all(result is None or isinstance(result, InvalidRequestError) for result in results)
    assert registry.names == ["a"]


async def test_what_is_in_the_files_is_part_of_it(paths: list[str]) -> None:
    registry = Registry(2)
    await load(registry, "a", paths[0])
    await load(registry, "b", paths[1])
    first, same = registry.find("a"), registry.find("b")
    assert first is not None and same is not None and first.digest == same.digest != ""
    write(Path(paths[0]), r=8, lora_alpha=17)
    await load(registry, "a", paths[0], replace=True)
    other = registry.find("a")
    assert other is not None and other.digest != first.digest


async def test_offline_the_least_recently_asked_for_makes_room(paths: list[str]) -> None:
    registry = Registry(2)
    named = [(name, path) for name, path in zip("abcd", paths, strict=True)]
    registry.find_or_load([named[0]])
    registry.find_or_load([named[1]])
    first = registry.find_or_load([named[0], named[0]])
    assert first[0] == first[1]
    registry.find_or_load([named[2]])
    assert registry.names == ["a", "c"]
    registry.used.add(first[0].uid)
    registry.find_or_load([named[3]])
    assert registry.names == ["a", "d"]
    with pytest.raises(InvalidRequestError, match="all 2 places"):
        registry.find_or_load([named[1], named[2], named[3]])  # more than go into one call
    with pytest.raises(InvalidRequestError, match="give this one another name"):
        registry.find_or_load([("a", paths[2])])
    assert registry.find("a") == first[0]
