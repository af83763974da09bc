"""Adapters on one rank: read from their directories when a request first names them, and put beside the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from shoal.config.lora import DOWN, UP, WEIGHTS_FILE, LoraConfig, digest_adapter, module_name, read_adapter
from shoal.distributed.group import GroupCoordinator
from shoal.errors import InvalidRequestError, ModelError
from shoal.layers.lora import AdapterSlots
from shoal.models.base import CausalLM
from shoal.sampling.rows import upload
from shoal.types.adapter import AdapterRef
from shoal.weights.safetensors_file import SafetensorsFile


class RankAdapters:
    """slots: of the layers. Knows which adapter is in which slot, and which request's slot of the batch has which.

    failures: why the request in a slot of the batch has no adapter here or on another rank, and gets no answer.
    """

    def __init__(
        self, config: LoraConfig, slots: AdapterSlots, model: CausalLM, world: GroupCoordinator, max_num_seqs: int
    ) -> None:
        self._config, self._slots, self._model, self._world = config, slots, model, world
        self.failures: dict[int, str] = {}
        self._loaded: dict[int, str] = {}
        # By slot of the batch, and -1 behind the last for rows that pad.
        self._of_request = np.full(max_num_seqs + 1, -1, np.int64)
        self._is_clear = True

    def assign(self, batch_slot: int, adapter: AdapterRef | None) -> None:
        """A request enters a slot of the batch: all ranks are told so in one order, and agree whether they can."""
        self.failures.pop(batch_slot, None)
        self._of_request[batch_slot] = -1 if adapter is None else adapter.slot
        if adapter is None or self._loaded.get(adapter.slot) == adapter.uid:
            return
        failure = ""
        try:
            self._load(adapter)
        except ModelError as error:
            failure = str(error)
        failed = torch.full((1,), float(bool(failure)), device=self._slots.mask.device)
        if self._world.world_size > 1:
            failed = self._world.all_reduce(failed)
        if failed.item():
            self._loaded.pop(adapter.slot, None)
            self._of_request[batch_slot] = -1
            self.failures[batch_slot] = failure or f"{adapter.path}: another rank could not load this adapter"

    def put_tokens(self, batch_slots: np.ndarray) -> None:
        """Before a step: the request's slot of each token [T]."""
        own = self._of_request[batch_slots]
        self._slots.is_used = bool((own >= 0).any())
        if self._slots.is_used:
            self._slots.put_tokens(upload(own, self._slots.mask.device))
        elif not self._is_clear:
            self._slots.mask.zero_()
        self._is_clear = not self._slots.is_used

    def rehearse(self) -> None:
        """Steps to come are compiled or captured with adapters in them."""
        self._slots.is_used, self._is_clear = True, False

    def _load(self, adapter: AdapterRef) -> None:
        path = Path(adapter.path)
        try:
            facts, digest = read_adapter(adapter.path, self._config.max_rank), digest_adapter(adapter.path)
        except InvalidRequestError as error:
            raise ModelError(f"an adapter cannot be loaded on this machine: {error}") from None
        if digest != adapter.digest:
            raise ModelError(
                f"the files in {path} are not those that were loaded: they changed since, or are others on this "
                "machine; load the adapter again (load_inplace), with the same files on every machine"
            )
        file = SafetensorsFile(path / WEIGHTS_FILE)
        matrices: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        try:
            for stored in file.names():
                if not stored.endswith(DOWN):
                    continue
                layer = stored.removesuffix(DOWN)
                module = module_name(layer)
                down, up = self._read(file, stored), self._read(file, layer + UP, facts.scaling(module))
                matrices[self._model.tensor_name(f"{module}.weight").removesuffix(".weight")] = (down, up)
        except (OSError, KeyError) as error:  # it changed meanwhile
            raise ModelError(f"{path} cannot be read: {error}") from None
        finally:
            file.close()
        self._loaded.pop(adapter.slot, None)
        try:
            taken = self._slots.fill(adapter.slot, matrices)
        except ModelError as error:
            self._slots.fill(adapter.slot, {})
            raise ModelError(f"{path}: {error}") from None
        for name in sorted(matrices.keys() - taken):
            if not self._model.expects_elsewhere(f"{name}.weight"):
                self._slots.fill(adapter.slot, {})
                raise ModelError(f"{path}: there is no linear layer {name} here that takes adapters")
        self._loaded[adapter.slot] = adapter.uid

    def _read(self, file: SafetensorsFile, name: str, scaling: float = 1.0) -> torch.Tensor:
        shape = file.shape(name)
        matrix = torch.empty(shape, dtype=torch.float32)
        file.read_into(name, [slice(0, size) for size in shape], matrix)
        matrix = (matrix * scaling).to(self._slots.dtype)
        if not bool(matrix.isfinite().all()):
            # All adapters are multiplied with all tokens: one that is not finite would be in every request's way.
            raise ModelError(f"{file.path}: {name} holds numbers that are not finite in {self._slots.dtype}")
        return matrix
