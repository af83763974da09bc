"""The bodies of /v1/load_lora_adapter and /v1/unload_lora_adapter, in vLLM's shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from shoal.protocol.fields import RequestBody
from shoal.protocol.neutral import Neutral


class LoadAdapterRequest(RequestBody):
    """An adapter's directory on the servers' machines, and the name that requests will give as their model."""

    lora_name: str
    lora_path: str
    load_inplace: bool | None = Field(None, description="Replace an adapter that has this name already.")


class UnloadAdapterRequest(RequestBody):
    """The name of an adapter that is no longer served."""

    # The name says it all.
    neutral: ClassVar[Mapping[str, Neutral]] = {"lora_int_id": Neutral(anything=True)}

    lora_name: str
