"""AdapterRegistry: which LoRA adapters are loaded, by the names that requests call them. Owned by whoever serves.

A name has a slot of the workers' tables and an id. The workers load what a request names when they first see it, so an
engine that was started again needs to be told nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from shoal.config.lora import LoraConfig, digest_adapter, read_adapter
from shoal.errors import InvalidRequestError, NotFoundError
from shoal.types.adapter import AdapterRef


class AdapterRegistry:
    """config: None where the engine has no room for adapters. is_used: whether a request that has not ended names an
    adapter's id."""

    def __init__(self, config: LoraConfig | None, is_used: Callable[[str], bool]) -> None:
        self._config, self._is_used = config, is_used
        # The least recently asked for first, where nobody unloads them by name (`find_or_load`).
        self._adapters: dict[str, AdapterRef] = {}
        # By name: those that are being loaded, and not served yet; None: no slot yet.
        self._tried: dict[str, AdapterRef | None] = {}
        # By slot, the id of what was given it last.
        self._owners: dict[int, str] = {}
        self._run, self._numbers = uuid.uuid4().hex[:12], itertools.count()

    @property
    def names(self) -> list[str]:
        return list(self._adapters)

    def find(self, name: str | None) -> AdapterRef | None:
        return None if name is None else self._adapters.get(name)

    def check_is_there(self, adapter: AdapterRef | None) -> None:
        """Raise NotFoundError where the slot is another's by now: it was unloaded while the request was prepared."""
        if adapter is not None and self._owners.get(adapter.slot) != adapter.uid:
            raise NotFoundError(f"the adapter from {adapter.path} was unloaded", "model", "model_not_found")

    @contextlib.asynccontextmanager
    async def trying(self, name: str, path: str, *, replace: bool = False) -> AsyncIterator[AdapterRef]:
        """Check an adapter and give it a slot; what goes on inside tries it, and when that ends well it is served.
        If it does not, everything is as before; until then the old one of this name is served, unless this one is tried
        in its place, where no other is free. replace: in place of one of this name, if there is one.

        Raises InvalidRequestError.
        """
        config = self._check(name)
        before = self._adapters.get(name)
        if before is not None and not replace:
            raise InvalidRequestError(
                f"an adapter called {name!r} is loaded already, from {before.path}; unload it first, or send "
                "load_inplace",
                "lora_name",
            )
        self._check_settled(name)
        directory = _absolute(path)
        # Before the files are read: no other load and no unload of this name comes between.
        self._tried[name] = None
        try:
            read_adapter(directory, config.max_rank)
            digest = await asyncio.to_thread(digest_adapter, directory)
            slot = self._free_slot()
            if slot is None and before is not None and not self._is_used(before.uid):
                slot = before.slot
            ref = self._tried[name] = self._give(slot, directory, digest)
            try:
                yield ref
            except BaseException:
                if before is not None and before.slot == ref.slot:
                    # The workers have lost it for this one; under another id they load it again.
                    self._adapters[name] = self._give(before.slot, before.path, before.digest)
                raise
        finally:
            del self._tried[name]
        self._adapters[name] = ref

    def find_or_load(self, wanted: Sequence[tuple[str, str]]) -> list[AdapterRef]:
        """The adapters of these names and paths, for requests of one call; those that are not loaded take the places of
        others that were not asked for lately. Raises InvalidRequestError."""
        refs = []
        names = {name for name, _ in wanted}
        for name, path in wanted:
            config, directory = self._check(name), _absolute(path)
            found = self._adapters.get(name)
            if found is None:
                read_adapter(directory, config.max_rank)
                digest = digest_adapter(directory)
                slot = self._free_slot()
                if slot is None:
                    idle = [other for other, ref in self._adapters.items()
                            if other not in names and not self._is_used(ref.uid)]  # fmt: skip
                    slot = self._adapters.pop(idle[0]).slot if idle else None
                found = self._give(slot, directory, digest)
            elif found.path != directory:
                raise InvalidRequestError(
                    f"an adapter called {name!r} is loaded already, from {found.path}; give this one another name",
                    "lora_name",
                )
            self._adapters.pop(name, None)
            self._adapters[name] = found  # behind all others
            refs.append(found)
        return refs

    def unload(self, name: str) -> None:
        """Requests that name it go on to their end. Raises NotFoundError, InvalidRequestError (it is being loaded)."""
        self._check_settled(name)
        if name not in self._adapters:
            loaded = ", ".join(self._adapters) or "none"
            raise NotFoundError(f"no adapter is called {name!r}; loaded: {loaded}", "lora_name", "model_not_found")
        del self._adapters[name]

    def _check_settled(self, name: str) -> None:
        if name in self._tried:
            raise InvalidRequestError(f"an adapter called {name!r} is being loaded now; try again later", "lora_name")

    def _check(self, name: str) -> LoraConfig:
        if self._config is None:
            raise InvalidRequestError("this engine takes no adapters; start it with --enable-lora")
        if not name.strip():
            raise InvalidRequestError("an adapter needs a name", "lora_name")
        return self._config

    def _free_slot(self) -> int | None:
        """One that nobody is in, nor requests of an adapter that was unloaded."""
        assert self._config is not None
        taken = {ref.slot for ref in (*self._adapters.values(), *self._tried.values()) if ref is not None}
        free = (slot for slot in range(self._config.max_loras)
                if slot not in taken and not self._is_used(self._owners.get(slot, "")))  # fmt: skip
        return next(free, None)

    def _give(self, slot: int | None, directory: str, digest: str) -> AdapterRef:
        """A new id for what is in the slot from now on. Raises InvalidRequestError for None."""
        assert self._config is not None
        if slot is None:
            num_others = self._config.max_loras - len(self._adapters)
            others = f", and {num_others} that still have requests" if num_others > 0 else ""
            raise InvalidRequestError(
                f"all {self._config.max_loras} places for adapters are taken ({', '.join(self._adapters) or 'none'}"
                f"{others}); unload one, or start with a larger --max-loras"
            )
        ref = AdapterRef(slot, f"{self._run}-{next(self._numbers)}", directory, digest)
        self._owners[slot] = ref.uid
        return ref


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
