"""Quantizes a checkpoint: layer after layer, each in a file of its own as soon as it is done, then what is left.

What goes on to the next layer is computed from the file of the last one: a run that is taken up again reads the same
numbers from the same files, and so comes to the same result.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch

from shoal.errors import ConfigError
from shoal.quantize.calibration import Inputs, collect_inputs, read_samples
from shoal.quantize.formats import quantization_config
from shoal.quantize.layers import quantize_layer
from shoal.quantize.network import Network
from shoal.quantize.order import (
    QuantizeDone,
    QuantizeLayer,
    QuantizeNews,
    QuantizeNote,
    QuantizeOrder,
    QuantizeProgress,
)
from shoal.quantize.output import REPORT, STATE, State, write_json
from shoal.quantize.packing import dense_of
from shoal.quantize.source import INDEX, SourceCheckpoint, read_header, read_source
from shoal.quantize.tensors import TensorReader, read_tensors, write_tensors

_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# Where in a layer's time each phase begins, and its share.
_READ, _QUANTIZE, _RUN = (0.0, 0.3), (0.3, 0.5), (0.8, 0.2)


def quantize(order: QuantizeOrder, say: Callable[[QuantizeNews], None]) -> None:
    """`output.prepare_output` has made the directory and its state. Raises ConfigError, ModelError."""
    source = read_source(Path(order.model))
    state = msgspec.json.decode((Path(order.out) / STATE).read_bytes(), type=State)
    Run(order, source, state, say).run()


class Run:
    """One order, from the layer on that the state names."""

    def __init__(
        self, order: QuantizeOrder, source: SourceCheckpoint, state: State, say: Callable[[QuantizeNews], None]
    ) -> None:
        self.order, self.source, self.state, self.say = order, source, state, say
        self.out = Path(order.out)
        self.reader = TensorReader(source)
        self.network = Network(source.directory, self.reader, _device(order.device))
        self.num_layers = self.network.num_layers
        self._check_sizes()

    def run(self) -> None:
        order, network = self.order, self.network
        hidden: list[torch.Tensor] = []
        if order.calibration is not None:
            samples = read_samples(
                self.source.directory, Path(order.calibration), order.num_samples, self._sequence_length()
            )
            if len(samples) < order.num_samples:
                self.say(
                    QuantizeNote(
                        f"the calibration text gives {len(samples)} samples of {samples.shape[1]} tokens; "
                        f"{order.num_samples} are asked for"
                    )
                )
            self._progress(0, "embedding", 0.0)
            hidden, self.records = network.embed(samples)
        for index in range(self.num_layers):
            resumed = index < len(self.state.rows)
            if not resumed:
                self._quantize_layer(index, hidden)
                write_json(self.out / STATE, msgspec.to_builtins(self.state))
            self.say(QuantizeLayer(index + 1, self.num_layers, self.state.rows[index], resumed))
            if hidden and index + 1 < self.num_layers:
                network.load_layer(index, self._dense_layer(index))
                hidden = [self._run_sample(index, number, hidden, "run", *_RUN) for number in range(len(hidden))]
            network.unload_layer(index)
        self._finish()

    def _quantize_layer(self, index: int, hidden: list[torch.Tensor]) -> None:
        network, order = self.network, self.order
        layer = network.load_layer(index)
        linears = self._quantized(index)
        name = network.layer_name(index)
        # Of a layer whose matrices all stay there are no scales.
        scale_dtype = next((self.reader.read(f"{name}.{matrix}.weight").dtype for matrix in linears), torch.float32)
        groups = []
        with torch.inference_mode():
            if hidden and linears:
                groups = collect_inputs(
                    layer,
                    linears,
                    len(hidden),
                    lambda number: self._run_sample(index, number, hidden, "read", *_READ),
                    network.of_experts(index),
                )
                self._note_unreached(index, linears, groups)
            done = quantize_layer(
                order,
                index,
                layer,
                linears,
                groups,
                (lambda: network.run_layer(index, hidden[0], self.records[index])) if hidden else None,
                scale_dtype,
                lambda phase, part: self._progress(index, phase, _QUANTIZE[0] + _QUANTIZE[1] * part),
            )
        tensors = {
            f"{name}.{matrix}.{suffix}": tensor
            for matrix, stored in done.matrices.items()
            for suffix, tensor in stored.items()
        }
        changed = layer.state_dict()
        for stored_name in self.reader.names(f"{name}."):
            key = stored_name.removeprefix(f"{name}.")
            module, _, suffix = key.rpartition(".")
            if module in done.matrices and suffix == "weight":
                continue
            tensor = self.reader.read(stored_name)
            # AWQ has divided some of them.
            tensors[stored_name] = changed[key].to(tensor.dtype) if key in changed else tensor
        write_tensors(self._file(index), tensors)
        self.state.rows.append(done.rows)

    def _note_unreached(self, index: int, linears: Iterable[str], groups: list[Inputs]) -> None:
        missing = set(linears).difference(*(group.names for group in groups))
        if missing:
            self.say(
                QuantizeNote(
                    f"layer {index + 1}: no token of the calibration text reaches {len(missing)} matrices of experts, "
                    f"such as {min(missing)}: they are rounded to the nearest, and their errors are of the weights"
                )
            )

    def _dense_layer(self, index: int) -> dict[str, torch.Tensor]:
        """What the file of a layer stands for, by names within the layer."""
        prefix = f"{self.network.layer_name(index)}."
        stored = {name.removeprefix(prefix): tensor for name, tensor in read_tensors(self._file(index)).items()}
        known = self.network.layers[index].state_dict().keys()
        tensors = {name: tensor for name, tensor in stored.items() if name in known}
        for matrix in self._quantized(index):
            own = {name.removeprefix(f"{matrix}."): t for name, t in stored.items() if name.startswith(f"{matrix}.")}
            tensors[f"{matrix}.weight"] = dense_of(own, self.order.bits)
        return tensors

    def _run_sample(
        self, index: int, number: int, hidden: list[torch.Tensor], phase: str, start: float, share: float
    ) -> torch.Tensor:
        self._progress(index, phase, start + share * number / len(hidden))
        return self.network.run_layer(index, hidden[number], self.records[index])

    def _finish(self) -> None:
        inside = tuple(f"{self.network.layer_name(index)}." for index in range(self.num_layers))
        rest = [name for name in self.source.tensors if not name.startswith(inside)]
        write_tensors(self._file(self.num_layers), {name: self.reader.read(name) for name in rest})
        weight_map, total = {}, 0
        for index in range(self.num_layers + 1):
            for name, stored in read_header(self._file(index)).items():
                weight_map[name] = self._file(index).name
                total += stored.num_bytes
        for path in self.source.directory.iterdir():
            if path.is_file() and not path.name.endswith((*_NOT_COPIED, ".index.json")) and path.name != "config.json":
                shutil.copyfile(path, self.out / path.name)
        write_json(
            self.out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )
        config = quantization_config(self.order, self._plain_modules())
        write_json(self.out / "config.json", self.source.config | {"quantization_config": config})
        if self.order.method == "gptq":
            write_json(self.out / "quantize_config.json", config)
        write_json(self.out / REPORT, self._report())
        (self.out / STATE).unlink()
        self.say(QuantizeDone(self.source.num_bytes, total))

    def _report(self) -> dict[str, Any]:
        order: dict[str, Any] = msgspec.to_builtins(self.order)
        return {
            "order": order,
            "error": "outputs over the calibration text, relative"
            if self.order.calibration is not None
            else "weights, relative",
            "matrices": [row for rows in self.state.rows for row in msgspec.to_builtins(rows)],
        }

    def _plain_modules(self) -> list[str]:
        found = self.network.other_linears()
        for index in range(self.num_layers):
            quantized = self._quantized(index)
            name = self.network.layer_name(index)
            found += [f"{name}.{matrix}" for matrix in self.network.linears(index) if matrix not in quantized]
            found += [f"{name}.{matrix}" for matrix in self.network.plain_matrices(index)]
        return found

    def _quantized(self, index: int) -> dict[str, torch.nn.Linear]:
        name = self.network.layer_name(index)
        return {
            matrix: module
            for matrix, module in self.network.linears(index).items()
            if not any(_is_part(part, f"{name}.{matrix}") for part in self.order.ignore)
        }

    def _all_matrices(self) -> list[str]:
        return [
            f"{self.network.layer_name(index)}.{matrix}"
            for index in range(self.num_layers)
            for matrix in self.network.linears(index)
        ]

    def _check_sizes(self) -> None:
        order = self.order
        if order.method == "awq" and any(self.network.of_experts(index) for index in range(self.num_layers)):
            raise ConfigError("--method awq of mixtures of experts is not built; gptq, fp8 and int8 are")
        num_quantized = 0
        for index in range(self.num_layers):
            for matrix, module in self._quantized(index).items():
                num_quantized += 1
                name = f"{self.network.layer_name(index)}.{matrix}"
                inputs, outputs = module.in_features, module.out_features
                if order.method in ("gptq", "awq"):
                    if order.group_size > 0 and inputs % order.group_size:
                        fits = [size for size in (256, 128, 64, 32, 16, 8) if inputs % size == 0]
                        works = f"--group-size {fits[0]} would do for it, " if fits else ""
                        raise ConfigError(
                            f"{name} has {inputs} inputs, which --group-size {order.group_size} does not divide; "
                            f"{works}-1 is one group, and --ignore {matrix.rpartition('.')[2]} leaves it as it is"
                        )
                    unit = 32 // order.bits
                    if inputs % unit or outputs % unit:
                        raise ConfigError(
                            f"{name} is {outputs} × {inputs}: numbers of {order.bits} bits are packed by {unit}, which "
                            f"does not divide both; --ignore {matrix.rpartition('.')[2]} leaves it as it is"
                        )
                if order.two_of_four and inputs % 4:
                    raise ConfigError(f"{name} has {inputs} inputs, no multiple of 4: --prune 2:4 cannot be done")
        names = self._all_matrices()
        for part in order.ignore:
            if not any(_is_part(part, name) for name in names):
                raise ConfigError(
                    f"--ignore {part}: no matrix of the layers has this name, or a part between dots of it; there are "
                    f"{', '.join(self.network.linears(0))}, and {self.network.layer_name(0)} for a whole layer"
                )
        if num_quantized == 0:
            raise ConfigError(f"--ignore {' '.join(order.ignore)} leaves nothing to quantize")

    def _sequence_length(self) -> int:
        most = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and self.order.sequence_length > most:
            raise ConfigError(f"--sequence-length {self.order.sequence_length} is more than the model takes ({most})")
        return self.order.sequence_length

    def _file(self, index: int) -> Path:
        """Of a layer; the one after the last: all else."""
        return self.out / f"model-{index + 1:05}-of-{self.num_layers + 1:05}.safetensors"

    def _progress(self, index: int, phase: str, part: float) -> None:
        self.say(QuantizeProgress(index + 1, self.num_layers, phase, (index + part) / self.num_layers))


def _is_part(part: str, name: str) -> bool:
    return f".{part}." in f".{name}."


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA GPU that PyTorch sees; --device cpu would work")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))
