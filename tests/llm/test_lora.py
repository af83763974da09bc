"""LoRA adapters: the outputs of the merged checkpoint, alone and many in a batch, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from shoal import LLM, LoRARequest, SamplingParams
from shoal.errors import ConfigError, EngineError, InvalidRequestError
from tests.adapters import make_adapter, merge
from tests.checkpoints import make_checkpoint
from tests.models.paged import random_tokens

NUM_ADAPTERS = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


class Adapted:
    """A checkpoint, adapters of different ranks and targets, and the merged checkpoints' greedy tokens."""

    def __init__(self, root: Path, family: str) -> None:
        self.path = make_checkpoint(root / "model", family)
        targets = {"phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}.get(family)
        self.adapters, self._merged = [], []
        for seed in range(NUM_ADAPTERS):
            kinds = {"targets": targets} if targets else {} if seed % 2 else {"targets": ("q_proj", "v_proj")}
            adapter = make_adapter(
                root / f"adapter-{seed}", self.path, seed=seed, rank=2 + seed % 3, use_rslora=False, **kinds
            )
            self.adapters.append(LoRARequest(f"adapter-{seed}", seed + 1, str(adapter)))
            self._merged.append(merge(root / f"merged-{seed}", self.path, adapter))

    def tokens(self, adapter: int | None, prompt: list[int]) -> list[int]:
        """Transformers' greedy tokens of the model with that adapter merged in; None: of the model itself."""
        path = self.path if adapter is None else self._merged[adapter]
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(GREEDY.max_tokens or 0):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return Adapted(tmp_path_factory.mktemp("llama"), "llama")


def start(path: Path, **options: object) -> LLM:
    return LLM(str(path), enable_lora=True, num_gpu_blocks_override=256, max_num_seqs=16, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2)])
def test_eight_adapters_in_one_batch(llama: Adapted, sizes: tuple[int, int]) -> None:
    """Each prompt's tokens are those of the checkpoint that its adapter is merged into; one prompt has none."""
    prompts = [random_tokens(length, seed=3) for length in (5, 17, 40, 40, 9, 33, 21, 64, 12)]
    wanted = [*llama.adapters, None]
    with start(llama.path, tensor_parallel_size=sizes[0], pipeline_parallel_size=sizes[1]) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], GREEDY, lora_request=wanted)
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        expected = llama.tokens(index if wanted[index] is not None else None, prompt)
        assert list(output.outputs[0].token_ids) == expected, index


def test_stored_as_one_matrix(tmp_path: Path) -> None:
    phi = Adapted(tmp_path, "phi3")
    prompt = random_tokens(20, seed=1)
    with start(phi.path) as llm:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], GREEDY, lora_request=phi.adapters[1])
    assert list(output.outputs[0].token_ids) == phi.tokens(1, prompt)


def test_one_prompt_with_many_adapters_shares_no_cache(llama: Adapted) -> None:
    prompt, alone = random_tokens(64, seed=2), llama.adapters[1]
    with start(llama.path) as llm:
        first = llm.generate([{"prompt_token_ids": prompt}], GREEDY, lora_request=alone)[0]
        again = llm.generate([{"prompt_token_ids": prompt}], GREEDY, lora_request=alone)[0]
        plain = llm.generate([{"prompt_token_ids": prompt}], GREEDY)[0]
        other = llm.generate([{"prompt_token_ids": prompt}], GREEDY, lora_request=llama.adapters[3])[0]
    assert first.outputs[0].token_ids == again.outputs[0].token_ids
    assert (first.num_cached_tokens, plain.num_cached_tokens, other.num_cached_tokens) == (0, 0, 0)
    assert again.num_cached_tokens and list(plain.outputs[0].token_ids) == llama.tokens(None, prompt)
    assert list(other.outputs[0].token_ids) == llama.tokens(3, prompt)


def test_what_is_refused(llama: Adapted, tmp_path: Path) -> None:
    prompt = {"prompt_token_ids": [1, 2, 3]}
    foreign = make_checkpoint(tmp_path / "foreign", "llama", hidden_size=128)
    stranger = make_adapter(tmp_path / "stranger", foreign, seed=1)
    wide = make_adapter(tmp_path / "wide", llama.path, seed=1, rank=20)
    dora = make_adapter(tmp_path / "dora", llama.path, seed=1, use_dora=True)
    cut = make_adapter(tmp_path / "cut", llama.path, seed=1)
    data = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(data[:-100])
    head = make_adapter(tmp_path / "head", llama.path, seed=1, targets=("lm_head",))
    with start(llama.path, max_loras=2) as llm:

        def ask(name: str, path: Path | str) -> None:
            llm.generate([prompt], GREEDY, use_tqdm=False, lora_request=LoRARequest(name, 1, str(path)))

        for name, path, message in (
            ("missing", tmp_path / "nowhere", "adapter_config.json is missing"),
            ("wide", wide, "has rank 20, and there is room for 16; start the server with --max-lora-rank 32"),
            ("dora", dora, "use_dora True is not supported"),
            ("cut", cut, r"has \d+ bytes of \d+; copy it again"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                ask(name, path)
        with pytest.raises(EngineError, match="the adapter is of another model"):
            ask("stranger", stranger)
        with pytest.raises(InvalidRequestError, match="lora_requests for 1 prompts"):
            llm.generate([prompt], GREEDY, lora_request=[None, None])
        ask("good", llama.adapters[0].lora_path)
        with pytest.raises(EngineError, match=r"no linear layer lm_head here that takes adapters"):
            ask("head", head)
        with pytest.raises(InvalidRequestError, match="all 2 places for adapters are taken"):
            llm.generate([prompt] * 3, GREEDY, lora_request=llama.adapters[:3])
    with pytest.raises(ConfigError, match="enable_lora does not go with deterministic mode"):
        LLM(str(llama.path), enable_lora=True, deterministic=True)
    with (
        LLM(str(llama.path), num_gpu_blocks_override=64) as llm,
        pytest.raises(InvalidRequestError, match="--enable-lora"),
    ):
        llm.generate([prompt], GREEDY, lora_request=llama.adapters[0])


def test_more_adapters_than_places_one_call_after_the_other(llama: Adapted) -> None:
    """The least recently used makes room, and is loaded again."""
    prompt = random_tokens(30, seed=4)
    with start(llama.path, max_loras=2) as llm:
        for index in (0, 1, 2, 3, 0, 3, 1):
            (output,) = llm.generate([{"prompt_token_ids": prompt}], GREEDY, lora_request=llama.adapters[index])
            assert list(output.outputs[0].token_ids) == llama.tokens(index, prompt), index


def test_files_that_change_are_not_taken_for_the_adapter(llama: Adapted, tmp_path: Path) -> None:
    """What is read again, or on another machine, must be what was loaded: no answer goes on with other weights."""
    prompt = {"prompt_token_ids": [1, 2, 3]}
    changing = make_adapter(tmp_path / "changing", llama.path, seed=5)
    adapter = LoRARequest("changing", 1, str(changing))
    with start(llama.path) as llm:
        [known] = llm._engine.engine.adapters.find_or_load([("changing", str(changing))])
        other = make_adapter(tmp_path / "other", llama.path, seed=6)
        shutil.copy(other / "adapter_model.safetensors", changing)
        with pytest.raises(EngineError, match=r"the files in .*changing are not those that were loaded"):
            llm.generate([prompt], GREEDY, use_tqdm=False, lora_request=adapter)
        assert llm._engine.engine.adapters.find("changing") == known


def assert_alike(llama: Adapted, first: Path, second: Path) -> None:
    """Two adapters give the same tokens."""
    prompt = {"prompt_token_ids": random_tokens(30, seed=9)}
    with start(llama.path) as llm:
        tokens = [
            llm.generate([prompt], GREEDY, lora_request=LoRARequest(path.name, 1, str(path)))[0].outputs[0].token_ids
            for path in (first, second)
        ]
    assert tokens[0] == tokens[1]


def test_an_alpha_of_its_own(llama: Adapted, tmp_path: Path) -> None:
    """alpha_pattern: the same as that alpha for all, where all layers match."""
    first = make_adapter(tmp_path / "pattern", llama.path, seed=5, alpha=6.0, alpha_pattern={".*_proj": 12.0})
    second = make_adapter(tmp_path / "plain", llama.path, seed=5, alpha=12.0)
    assert_alike(llama, first, second)


def test_rank_stabilized(llama: Adapted, tmp_path: Path) -> None:
    """alpha / sqrt(r) in place of alpha / r: the same as another alpha."""
    first = make_adapter(tmp_path / "rs", llama.path, seed=5, rank=4, alpha=6.0, use_rslora=True)
    second = make_adapter(tmp_path / "plain", llama.path, seed=5, rank=4, alpha=12.0)
    assert json.loads((first / "adapter_config.json").read_text())["use_rslora"]
    assert_alike(llama, first, second)
