"""AdapterRef: the low-rank adapter (LoRA) that a request wants, as every floor speaks of it."""

from __future__ import annotations

import dataclasses

import msgspec


class AdapterRef(msgspec.Struct, frozen=True):
    """slot: of the workers' tables that hold adapters; it says nothing of what is in it now, which `uid` does: every
    time an adapter is loaded it has another one. path: of its directory, the same on every machine; digest: of what
    was in it, which every machine must find there whenever it reads it."""

    slot: int
    uid: str
    path: str
    digest: str


@dataclasses.dataclass(frozen=True)
class LoRARequest:
    """Offline use: an adapter by name and directory, as vLLM spells it. lora_int_id says nothing here."""

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""
