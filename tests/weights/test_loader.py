"""Loading: every file format, tied and converted weights, and one clear error for whatever is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.attention.registry import create_attention_backend
from shoal.config.model_config import load_model_config
from shoal.distributed.group import GroupCoordinator
from shoal.distributed.parallel_dims import ParallelDims
from shoal.errors import ModelError
from shoal.layers.checkpoint import CheckpointTensor, HoldsWeights, whole
from shoal.layers.context import BuildContext
from shoal.models.base import CausalLM
from shoal.models.registry import build_model
from shoal.weights.loader import load_weights
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.models.paged import CPU, PagedModel
from tests.rank_threads import on_ranks

TOKENS = [5, 17, 300, 2]
Tensors = dict[str, torch.Tensor]


def build(path: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    context = BuildContext(dtype=dtype, device=CPU, attention_backend=create_attention_backend("torch_paged"))
    return build_model(load_model_config(path), context)


def load(path: Path, load_format: str = "auto", **more: object) -> CausalLM:
    model = build(path)
    load_weights(model, load_model_config(path), load_format, **more)  # type: ignore[arg-type]
    return model


def edit(path: Path, change: Callable[[Tensors], None]) -> Path:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def qwen2(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "qwen2", "qwen2")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "llama", "llama")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    path = make_checkpoint(tmp_path / "sharded", "llama", max_shard_size="100KB")
    assert (path / "model.safetensors.index.json").exists() and len(list(path.glob("*.safetensors"))) > 2
    return path


def test_shards_equal_one_file(llama: Path, sharded: Path) -> None:
    assert torch.equal(PagedModel(llama).logits(TOKENS, 4), PagedModel(sharded).logits(TOKENS, 4))


def test_shards_by_another_name_with_an_index(llama: Path, sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = index.read_text().replace('"model-0', '"gptq_model-4bit-128g-0')
    (sharded / "gptq_model-4bit-128g.safetensors.index.json").write_text(content)
    index.unlink()
    for path in list(sharded.glob("model-*.safetensors")):
        path.rename(path.with_name(f"gptq_model-4bit-128g{path.name.removeprefix('model')}"))
    tokens = PagedModel(llama).logits(TOKENS, 4)
    assert torch.equal(PagedModel(sharded).logits(TOKENS, 4), tokens)


def test_bin_files_only_when_asked_for(qwen2: Path) -> None:
    expected = PagedModel(qwen2).logits(TOKENS, 4)
    torch.save(load_file(qwen2 / "model.safetensors"), qwen2 / "pytorch_model.bin")
    (qwen2 / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"in .bin files only \(pytorch_model.bin\).*--load-format pt"):
        load(qwen2)
    assert torch.equal(PagedModel(qwen2, load_format="pt").logits(TOKENS, 4), expected)


def test_bin_files_run_no_code(qwen2: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (print, ("code of the file ran",))

    torch.save({"model.norm.weight": Trap()}, qwen2 / "pytorch_model.bin")
    (qwen2 / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pytorch_model.bin cannot be read as a file of weights"):
        load(qwen2, "pt")


@pytest.mark.parametrize("stored", [True, False])
def test_tied_head_stored_or_not(qwen2: Path, stored: bool) -> None:
    expected = PagedModel(qwen2).logits(TOKENS, 4)

    def change(tensors: Tensors) -> None:
        tensors.pop("lm_head.weight", None)
        if stored:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    assert torch.equal(PagedModel(edit(qwen2, change)).logits(TOKENS, 4), expected)


def test_names_of_a_bare_decoder(tmp_path: Path) -> None:
    for family in ("qwen2", "opt"):
        path = make_checkpoint(tmp_path / family, family)
        expected = PagedModel(path).logits(TOKENS, 4)

        def strip(tensors: Tensors) -> None:
            for name in list(tensors):
                tensors[name.removeprefix("model.")] = tensors.pop(name)

        assert torch.equal(PagedModel(edit(path, strip)).logits(TOKENS, 4), expected)


def test_old_buffers_are_let_be(llama: Path) -> None:
    load(edit(llama, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})))


def test_dtypes_are_converted(tmp_path: Path) -> None:
    narrow = make_checkpoint(tmp_path / "a", "llama", dtype=torch.bfloat16)
    tensors = {name: tensor.float() for name, tensor in load_file(narrow / "model.safetensors").items()}
    wide = make_checkpoint(tmp_path / "b", "llama")
    save_file(tensors, wide / "model.safetensors")
    assert torch.equal(PagedModel(narrow).logits(TOKENS, 4), PagedModel(wide).logits(TOKENS, 4))


def test_other_files_beside_the_weights(llama: Path) -> None:
    save_file({"other": torch.ones(2)}, llama / "consolidated.safetensors")
    load(llama)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            "1 of 21 tensors are missing .*layers.1.mlp.up_proj.weight",
        ),
        (lambda t: t.pop("lm_head.weight"), "1 of 21 tensors are missing .*first is lm_head.weight"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}),
            "unexpected tensor model.layers.2.mlp",
        ),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.ones(2)}), "unexpected tensor .*quantized"),
        (lambda t: t.update({"model.norm.weight": torch.ones(63)}), r"model.norm.weight has shape \[63\].* \[64\]"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64).int()}),
            "model.norm.weight is int32; the config describes plain",
        ),
        (lambda t: t.update({"norm.weight": torch.ones(64)}), "tensor model.norm.weight is stored twice"),
    ],
)
def test_wrong_tensors_are_named(llama: Path, change: Callable[[Tensors], None], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(edit(llama, change))


def test_wrong_files_are_named(llama: Path, sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ModelError, match=f"1 of .* weight files are missing: {shard.name}"):
        load(sharded)
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=f"{shard.name} is not a whole safetensors file"):
        load(sharded)
    save_file({"x": torch.ones(1)}, shard)
    with pytest.raises(ModelError, match=f"{shard.name} lacks .*, which the index places there"):
        load(sharded)
    shard.write_bytes(content)
    load(sharded)
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(ModelError, match="index.json is broken: KeyError"):
        load(sharded)
    index.unlink()
    with pytest.raises(ModelError, match="has shards such as .* but no model.safetensors.index.json"):
        load(sharded)
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights: neither model.safetensors nor"):
        load(llama)
    for name in ("model-Q4_K_M.gguf", "consolidated.00.pth"):
        (llama / name).touch()
        with pytest.raises(ModelError, match=f"has no weights: .*; {name} is of a format that is not read"):
            load(llama)
        (llama / name).unlink()


def test_progress_and_memory(sharded: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = load(sharded, progress=lambda done, total: seen.append((done, total)))
    done = [d for d, _ in seen]
    assert done == sorted(done) and seen[-1][0] == seen[-1][1] == model.weight_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_dummy_weights(tmp_path: Path, family: str) -> None:
    path = make_checkpoint(tmp_path, family)
    for file in path.glob("*.safetensors"):
        file.unlink()

    def embedding(seed: int) -> torch.Tensor:
        return load(path, "dummy", seed=seed).embed_tokens.weight

    assert torch.equal(embedding(1), embedding(1)) and not torch.equal(embedding(1), embedding(2))
    model = load(path, "dummy", seed=3)
    hidden = torch.randn(4, model.lm_head.method.spec.in_features)
    logits = model.compute_logits(hidden)
    assert logits.isfinite().all() and logits.std() > 0.1


def test_a_rank_reads_its_piece_only(tmp_path: Path) -> None:
    """Pieces go through the file's own slicing; dummy pieces are those of the whole."""
    save_file({"w": torch.arange(24.0).view(4, 6)}, tmp_path / "model.safetensors")

    class Piece:
        """A model and its only layer."""

        def __init__(self, index: tuple[slice, slice]) -> None:
            self.index = index
            self.destination = torch.empty([part.stop - part.start for part in index])

        def weight_holders(self) -> Iterator[HoldsWeights]:
            yield self

        def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
            yield CheckpointTensor(
                name="w", shape=(4, 6), index=self.index, destination=self.destination, kind="matrix"
            )

        def tensor_name(self, stored: str) -> str:
            return stored

        def expects_elsewhere(self, name: str) -> bool:
            return False

        def process_after_load(self) -> None:
            return None

        def weight_bytes(self) -> int:
            return self.destination.nbytes

    config = load_model_config(make_checkpoint(tmp_path / "any", "llama"))
    object.__setattr__(config, "path", str(tmp_path))
    half, whole = Piece((slice(2, 4), slice(3, 6))), Piece((slice(0, 4), slice(0, 6)))
    assert load_weights(half, config) == half.destination.nbytes
    assert half.destination.tolist() == [[15, 16, 17], [21, 22, 23]]
    load_weights(half, config, "dummy", 4)
    load_weights(whole, config, "dummy", 4)
    assert torch.equal(half.destination, whole.destination[2:, 3:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_read_every_byte_once_but_for_what_all_need(tmp_path: Path, family: str, size: int) -> None:
    """A rank reads as many bytes as its weights have; together the ranks read the file, and copies of small tensors."""
    path = make_checkpoint(tmp_path, family, num_key_value_heads=4, vocab_size=1000, tie_word_embeddings=False)
    config = load_model_config(path)
    stored = sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values())

    def work(group: GroupCoordinator) -> tuple[int, int, int]:
        dims = ParallelDims(tensor_size=size, rank=group.rank_in_group)
        backend = create_attention_backend("torch_paged")
        model = build_model(
            config,
            BuildContext(dtype=torch.float32, device=CPU, attention_backend=backend, parallel=dims, tensor_group=group),
        )
        tensors = [
            tensor for layer in model.weight_holders() for tensor in layer.checkpoint_tensors() if not tensor.optional
        ]
        copied = sum(tensor.destination.nbytes for tensor in tensors if tensor.is_whole)
        return load_weights(model, config), sum(tensor.destination.nbytes for tensor in tensors), copied

    ranks = on_ranks(size, work)
    assert all(read == own for read, own, _ in ranks)
    assert sum(read for read, _, _ in ranks) == stored + (size - 1) * ranks[0][2]
    assert ranks[0][2] < stored / 5


def test_layers_pack_one_after_the_other(tmp_path: Path) -> None:
    """As soon as a layer has all its tensors, and without a trace of them in the loader; a tied one at the very end."""
    names = [f"{layer}.{part}" for layer in "ab" for part in (0, 1)]
    save_file({name: torch.ones(4) for name in names}, tmp_path / "model.safetensors")
    packed: list[str] = []

    class Layer:
        def __init__(self, name: str, num_parts: int) -> None:
            self.name, self.num_parts = name, num_parts
            self.weight = torch.zeros(2, 4)
            self.views: list[weakref.ref[torch.Tensor]] = []

        def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
            for part in range(self.num_parts):
                view = self.weight[part]
                self.views.append(weakref.ref(view))
                yield whole(f"{self.name}.{part}", view, "matrix")
                del view

        def process_after_load(self) -> None:
            assert not self.num_parts or torch.equal(self.weight, torch.ones(2, 4))
            assert not any(view() is not None for view in self.views), "the loader keeps what the layer frees"
            packed.append(self.name)

        def weight_bytes(self) -> int:
            return self.weight.nbytes

    class Model:
        def weight_holders(self) -> Iterator[HoldsWeights]:
            yield from (Layer("tied", 0), Layer("a", 2), Layer("b", 2))

        def tensor_name(self, stored: str) -> str:
            return stored

        def expects_elsewhere(self, name: str) -> bool:
            return False

    config = load_model_config(make_checkpoint(tmp_path / "any", "llama"))
    object.__setattr__(config, "path", str(tmp_path))
    done: list[tuple[int, list[str]]] = []
    load_weights(Model(), config, progress=lambda num_bytes, _: done.append((num_bytes, list(packed))))
    assert packed == ["a", "b", "tied"]
    assert done == [(16, []), (32, ["a"]), (48, ["a"]), (64, ["a", "b"])]


@pytest.mark.slow
def test_no_rank_holds_more_than_its_share_and_a_fifth(tmp_path: Path) -> None:
    """Two processes load half a gigabyte: their peak memory, above what they had before the model was built."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "benchmarks/loading.py", "--gib", "0.5", "--tensor-parallel-size", "2"]
    output = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=True, text=True, stdout=subprocess.PIPE
    ).stdout
    lines = [line.split() for line in output.splitlines()]
    assert lines[0][:5] == ["ranks", "rank", "share", "peak", "peak/share"] and len(lines) == 3
    for line in lines[1:]:
        share, peak = float(line[2]), float(line[3])
        assert share > 200 and peak <= 1.2 * share
