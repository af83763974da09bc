"""AdapterRegistry: which LoRA adapters are loaded, by the names that requests call them. Owned by whoever serves.

A name has a slot of the workers' tables and an id. The workers load what a request names when they first see it, so an
engine that was started again needs to be told nothing.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from pathlib import Path

from shoal.config.lora import LoraConfig, read_adapter
from shoal.errors import InvalidRequestError, NotFoundError
from shoal.types.adapter import AdapterRef


class AdapterRegistry:
    """config: None where the engine has no room for adapters. is_used: whether a request that has not ended names an
    adapter's id."""

    def __init__(self, config: LoraConfig | None, is_used: Callable[[str], bool]) -> None:
        self._config, self._is_used = config, is_used
        self._adapters: dict[str, AdapterRef] = {}
        # Slots of adapters that were unloaded, until their requests have ended.
        self._leaving: list[AdapterRef] = []
        self._run, self._numbers = uuid.uuid4().hex[:12], itertools.count()

    @property
    def names(self) -> list[str]:
        return list(self._adapters)

    def find(self, name: str | None) -> AdapterRef | None:
        return None if name is None else self._adapters.get(name)

    def load(self, name: str, path: str, *, replace: bool = False) -> AdapterRef:
        """Check an adapter and give it a slot. replace: in place of one of this name, if there is one.

        Raises InvalidRequestError.
        """
        if self._config is None:
            raise InvalidRequestError("this engine takes no adapters; start it with --enable-lora")
        if not name.strip():
            raise InvalidRequestError("an adapter needs a name", "lora_name")
        if name in self._adapters and not replace:
            raise InvalidRequestError(
                f"an adapter called {name!r} is loaded already, from {self._adapters[name].path}; unload it first",
                "lora_name",
            )
        directory = str(Path(path).expanduser().absolute())
        read_adapter(directory, self._config.max_rank)
        if name in self._adapters:
            self.unload(name)
        ref = AdapterRef(self._free_slot(), f"{self._run}-{next(self._numbers)}", directory)
        self._adapters[name] = ref
        return ref

    def find_or_load(self, name: str, path: str) -> AdapterRef:
        """The adapter of that name and path, loaded unless it is. Raises InvalidRequestError."""
        found = self._adapters.get(name)
        if found is not None and found.path == str(Path(path).expanduser().absolute()):
            return found
        return self.load(name, path)

    def unload(self, name: str) -> None:
        """Requests that name it go on to their end. Raises NotFoundError."""
        if name not in self._adapters:
            loaded = ", ".join(self._adapters) or "none"
            raise NotFoundError(f"no adapter is called {name!r}; loaded: {loaded}", "lora_name", "model_not_found")
        self._leaving.append(self._adapters.pop(name))

    def _free_slot(self) -> int:
        assert self._config is not None
        self._leaving = [ref for ref in self._leaving if self._is_used(ref.uid)]
        taken = {ref.slot for ref in (*self._adapters.values(), *self._leaving)}
        for slot in range(self._config.max_loras):
            if slot not in taken:
                return slot
        raise InvalidRequestError(
            f"all {self._config.max_loras} places for adapters are taken ({', '.join(self._adapters)}"
            f"{', and one that still has requests' * bool(self._leaving)}); unload one, or start with a larger "
            "--max-loras"
        )
