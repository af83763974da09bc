"""A model's own code in Transformers, of which one decoder layer at a time has weights.

The calibration text goes through the layers one after the other: what a layer gives is the next one's input.
T tokens, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoal.errors import ModelError
from shoal.quantize.experts import Experts, unstack_experts
from shoal.quantize.tensors import TensorReader

# Of a layer's call, but for the hidden states: by place, by name.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Network:
    """The layers of a checkpoint, all without weights until `load_layer`. Computes in fp32."""

    def __init__(self, directory: Path, reader: TensorReader, device: torch.device) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        try:
            self.config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
            with _parameters_on_meta():
                model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        except (ValueError, KeyError, OSError, ImportError) as error:
            raise ModelError(f"Transformers cannot make the model of {directory}: {error}") from error
        self.device = device
        self.reader = reader
        self.model = model.eval().requires_grad_(False)
        self.prefix, self.layers = _decoder_layers(self.model, self.config.get_text_config().num_hidden_layers)
        # Some checkpoints leave out the name of the model inside.
        self._left_out = f"{self.model.base_model_prefix}."
        unstack_experts(self.model, lambda name: self._stored(name) is not None)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def layer_name(self, index: int) -> str:
        """As the checkpoint has it: model.layers.3"""
        name = f"{self.prefix}.{index}"
        if not self.reader.has_any(f"{name}.") and name.startswith(self._left_out):
            return name.removeprefix(self._left_out)
        return name

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The matrices of a layer, by their names within it. Raises ModelError for layers that hold others."""
        layer = self.layers[index]
        for name, parameter in layer.named_parameters():
            if parameter.dim() > 2:
                raise ModelError(
                    f"{self.layer_name(index)}.{name} holds several matrices in one tensor {tuple(parameter.shape)} "
                    f"({type(self.model).__name__}: experts, or a convolution); such layers cannot be quantized here, "
                    "models whose layers are plain linear ones can be"
                )
        # What has one output is no matrix: the gate of an expert that all tokens share.
        found = {
            name: module
            for name, module in layer.named_modules()
            if type(module) is nn.Linear and module.out_features > 1
        }
        if not found:
            raise ModelError(f"the layers of {type(self.model).__name__} have no linear modules to quantize")
        return found

    def of_experts(self, index: int) -> frozenset[str]:
        """Of `linears`, those of experts, which only some tokens reach."""
        layer = self.layers[index]
        prefixes = tuple(f"{name}." for name, module in layer.named_modules() if isinstance(module, Experts))
        return frozenset(name for name in self.linears(index) if prefixes and name.startswith(prefixes))

    def plain_matrices(self, index: int) -> list[str]:
        """Modules of a layer with a matrix that is none of `linears`: routers and gates."""
        linears = self.linears(index)
        return [
            name
            for name, module in self.layers[index].named_modules()
            if name not in linears and getattr(getattr(module, "weight", None), "ndim", 0) == 2
        ]

    def other_linears(self) -> list[str]:
        """Linear modules outside of the layers, such as lm_head."""
        inside = f"{self.prefix}."
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and not name.startswith(inside)
        ]

    def load_layer(self, index: int, tensors: dict[str, torch.Tensor] | None = None) -> nn.Module:
        """Give a layer its weights: the checkpoint's, or `tensors` by their names within the layer."""
        layer, name = self.layers[index], self.layer_name(index)
        if tensors is None:
            tensors = {key: self._read(f"{name}.{key}") for key in layer.state_dict()}
        self._fill(layer, tensors)
        return layer

    def unload_layer(self, index: int) -> None:
        layer = self.layers[index]
        for module in layer.modules():
            for key, parameter in module.named_parameters(recurse=False):
                setattr(module, key, nn.Parameter(parameter.to("meta"), requires_grad=False))

    @torch.inference_mode()
    def embed(self, samples: torch.Tensor) -> tuple[list[torch.Tensor], list[Arguments]]:
        """samples int64 [S, T] -> (what layer 0 is given, S times fp32 [1, T, H] on the host; the other arguments of
        each layer, which are those of any sample)."""
        inside = f"{self.prefix}."
        of_base = {id(parameter) for parameter in self.model.base_model.parameters()}
        names = [name for name, parameter in self.model.named_parameters() if id(parameter) in of_base]
        tensors = {name: self._read(name) for name in names if not name.startswith(inside)}
        self._fill(self.model, tensors)
        for module in self.model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                if buffer is not None:
                    setattr(module, key, buffer.to(self.device))
        records: list[Arguments] = []
        inputs = []
        for returns_tuple in (False, True):
            try:
                _, records = self._pass(samples[:1], self.num_layers, returns_tuple)
                break
            except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
                if returns_tuple:
                    raise ModelError(
                        f"the layers of {type(self.model).__name__} cannot be run alone: {error}"
                    ) from error
        for sample in samples.split(1):
            hidden, _ = self._pass(sample, 1, returns_tuple)
            inputs.append(hidden.cpu())
        for name in tensors:
            module = self.model.get_submodule(name.rpartition(".")[0])
            key = name.rpartition(".")[2]
            setattr(module, key, nn.Parameter(getattr(module, key).to("meta"), requires_grad=False))
        return inputs, records

    @torch.inference_mode()
    def run_layer(self, index: int, hidden: torch.Tensor, record: Arguments) -> torch.Tensor:
        """hidden [1, T, H] on the host -> the layer's output there."""
        arguments, keywords = record
        output = self.layers[index](hidden.to(self.device), *arguments, **keywords)
        return (output[0] if isinstance(output, tuple) else output).cpu()

    def _pass(self, sample: torch.Tensor, num_layers: int, returns_tuple: bool) -> tuple[torch.Tensor, list[Arguments]]:
        """Run the model with layers that hand on what they are given, up to `num_layers`: what the first was given,
        and the other arguments of each."""
        records: list[Arguments] = []
        first: list[torch.Tensor] = []

        def stand_in(*arguments: Any, **keywords: Any) -> Any:
            hidden = arguments[0] if arguments else keywords.pop("hidden_states")
            first.append(hidden)
            if hidden.shape != first[0].shape:
                raise TypeError("layers return tuples")
            records.append((arguments[1:], keywords))
            if len(records) == num_layers:
                raise _Enough
            return (hidden,) if returns_tuple else hidden

        for layer in self.layers:
            layer.forward = stand_in
        try:
            self.model.base_model(input_ids=sample.to(self.device), use_cache=False)
        except _Enough:
            pass
        finally:
            for layer in self.layers:
                del layer.forward
        if len(records) != num_layers:
            raise ModelError(f"{type(self.model).__name__} ran {len(records)} of its {num_layers} layers")
        return first[0], records

    def _read(self, name: str) -> torch.Tensor:
        if (stored := self._stored(name)) is not None:
            return self.reader.read(stored)
        raise ModelError(
            f"the checkpoint has no {name}, which Transformers' {type(self.model).__name__} has; it stores its layers "
            "in another form, and cannot be quantized here"
        )

    def _stored(self, name: str) -> str | None:
        """As the checkpoint has it."""
        return next((each for each in (name, name.removeprefix(self._left_out)) if each in self.reader), None)

    def _fill(self, module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            owner, _, key = name.rpartition(".")
            target = module.get_submodule(owner)
            value = tensor.to(self.device, torch.float32 if tensor.is_floating_point() else tensor.dtype)
            expected = getattr(target, key).shape
            if value.shape != expected:
                raise ModelError(f"{name} is {tuple(value.shape)} in the checkpoint, {tuple(expected)} by its config")
            if key in dict(target.named_buffers(recurse=False)):
                setattr(target, key, value)
            else:
                setattr(target, key, nn.Parameter(value, requires_grad=False))


class _Enough(Exception):
    """All layers that are asked for have been given their arguments."""


def _decoder_layers(model: nn.Module, num_layers: int) -> tuple[str, nn.ModuleList]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name, module
    raise ModelError(
        f"{type(model).__name__} has no list of its {num_layers} decoder layers, so it cannot be quantized here"
    )


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are made take no memory for parameters; buffers, which no checkpoint has, are computed as ever."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
