"""LLM.embed and LLM.score over a real engine core, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.nn.functional import cosine_similarity, normalize

from shoal import LLM, PoolingParams, SamplingParams
from shoal.errors import InvalidRequestError, ModelError
from tests.checkpoints import byte_level_tokenizer
from tests.pooling_checkpoints import (
    make_classifier,
    make_decoder,
    make_encoder,
    reference_scores,
    reference_states,
    write_dense,
    write_modules,
)

OPTIONS = dict(device="cpu", max_model_len=128, kv_cache_memory="4MiB")
TEXTS = ["What is the capital of France?", "北京、上海、西安和成都都很好", "x"]


def ids(text: str) -> list[int]:
    return list(byte_level_tokenizer()(text)["input_ids"])


@pytest.fixture(scope="module")
def embedding_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("models") / "embed", "qwen3")


@pytest.fixture(scope="module")
def embedder(embedding_model: Path) -> Iterator[LLM]:
    with LLM(model=str(embedding_model), hf_overrides={"is_matryoshka": True}, **OPTIONS) as llm:
        yield llm


def test_embed(embedder: LLM, embedding_model: Path) -> None:
    states = [state[-1] for state in reference_states(embedding_model, [ids(text) for text in TEXTS])]
    outputs = embedder.embed([*TEXTS[:2], ids(TEXTS[2])], use_tqdm=False)
    for output, state in zip(outputs, states, strict=True):
        found = torch.tensor(output.outputs.embedding)
        torch.testing.assert_close(found, normalize(state, dim=0), atol=1e-4, rtol=1e-4)
        assert output.outputs.hidden_size == 64
    assert (outputs[0].prompt, outputs[2].prompt) == (TEXTS[0], None)
    assert outputs[0].prompt_token_ids == ids(TEXTS[0])
    [short] = embedder.embed(TEXTS[0], pooling_params=PoolingParams(dimensions=5), use_tqdm=False)
    found = torch.tensor(short.outputs.embedding)
    torch.testing.assert_close(found, normalize(states[0][:5], dim=0), atol=1e-4, rtol=1e-4)
    [cut] = embedder.embed("x " * 300, use_tqdm=False, truncate_prompt_tokens=-1)
    assert len(cut.prompt_token_ids) == 128
    assert embedder.embed([], use_tqdm=False) == []


def test_scores_of_embeddings(embedder: LLM, embedding_model: Path) -> None:
    a, b, c = (state[-1] for state in reference_states(embedding_model, [ids(text) for text in TEXTS]))
    outputs = embedder.score(TEXTS[0], TEXTS[1:], use_tqdm=False)
    wanted = [cosine_similarity(a, b, dim=0), cosine_similarity(a, c, dim=0)]
    assert [output.outputs.score for output in outputs] == pytest.approx([float(each) for each in wanted], abs=1e-4)


def test_what_a_model_for_embeddings_refuses(embedder: LLM) -> None:
    with pytest.raises(InvalidRequestError, match=r"this model makes embeddings .*LLM\.embed"):
        embedder.generate("hi", SamplingParams(max_tokens=1), use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="this model makes embeddings"):
        embedder.chat([{"role": "user", "content": "hi"}], use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="dimensions must be from 1 to 64"):
        embedder.embed("hi", pooling_params=PoolingParams(dimensions=65), use_tqdm=False)
    with pytest.raises(InvalidRequestError, match=r"prompt 1 of 2: the text has 200 tokens; this model takes 128"):
        embedder.embed(["hi", [5] * 200], use_tqdm=False)


def test_score(tmp_path: Path) -> None:
    path = make_classifier(tmp_path, "llama")
    wanted = torch.cat(reference_scores(path, [ids(TEXTS[0]) + ids(text) for text in TEXTS[1:]]))
    with LLM(model=str(path), **OPTIONS) as llm:
        outputs = llm.score(TEXTS[0], TEXTS[1:], use_tqdm=False)
        assert [output.outputs.score for output in outputs] == pytest.approx(wanted.sigmoid().tolist(), abs=1e-4)
        assert outputs[0].prompt_token_ids == ids(TEXTS[0]) + ids(TEXTS[1])
        raw = llm.score(TEXTS[0], TEXTS[1:], pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        assert [output.outputs.score for output in raw] == pytest.approx(wanted.tolist(), abs=1e-4)
        template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}?"
        [output] = llm.score("a", "b", chat_template=template, use_tqdm=False)
        [prompted] = reference_scores(path, [ids("<query>a<document>b?")])
        assert output.outputs.score == pytest.approx(float(prompted.sigmoid()), abs=1e-4)
        with pytest.raises(InvalidRequestError, match="this model makes scores"):
            llm.embed("hi", use_tqdm=False)
        with pytest.raises(InvalidRequestError, match="3 texts in data_1 and 2 in data_2"):
            llm.score(TEXTS, TEXTS[1:], use_tqdm=False)


def test_a_model_of_several_labels_gives_no_score(tmp_path: Path) -> None:
    with (
        LLM(model=str(make_classifier(tmp_path, "llama", num_labels=3)), **OPTIONS) as llm,
        pytest.raises(InvalidRequestError, match=r"gives 3 \(num_labels\)"),
    ):
        llm.score("a", "b", use_tqdm=False)


def test_a_generating_model_says_how_it_would_embed() -> None:
    with LLM(device="cpu", max_model_len=64, kv_cache_memory="16MiB") as llm:
        with pytest.raises(InvalidRequestError, match="this model generates text .*--runner pooling"):
            llm.embed("hi", use_tqdm=False)
        with pytest.raises(InvalidRequestError, match="this model generates text"):
            llm.score("a", "b", use_tqdm=False)


def test_an_encoder_embeds_as_transformers_does(tmp_path: Path) -> None:
    path = make_encoder(tmp_path, "xlm-roberta")
    write_modules(path, "mean", "Normalize")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    states = reference_states(path, [tokenizer(text)["input_ids"] for text in TEXTS])
    with LLM(model=str(path), device="cpu") as llm:
        for output, state in zip(llm.embed(TEXTS, use_tqdm=False), states, strict=True):
            found = torch.tensor(output.outputs.embedding)
            torch.testing.assert_close(found, normalize(state.mean(0), dim=0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2)])
def test_layers_behind_the_pooling(tmp_path: Path, sizes: tuple[int, int]) -> None:
    path = make_encoder(tmp_path, "bert")
    write_modules(path, "mean", "Dense", "Dense", "Normalize")
    generator = torch.Generator().manual_seed(7)
    wide, bias, narrow = (torch.randn(shape, generator=generator) / 8 for shape in ((96, 64), (96,), (24, 96)))
    write_dense(path, 2, wide, bias, "torch.nn.modules.activation.Tanh")
    write_dense(path, 3, narrow, None, "torch.nn.modules.linear.Identity")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    states = reference_states(path, [tokenizer(text)["input_ids"] for text in TEXTS])
    options = {"device": "cpu", "tensor_parallel_size": sizes[0], "pipeline_parallel_size": sizes[1]}
    with LLM(model=str(path), hf_overrides={"is_matryoshka": True}, **options) as llm:  # type: ignore[arg-type]
        outputs = llm.embed(TEXTS, use_tqdm=False)
        [short] = llm.embed(TEXTS[0], pooling_params=PoolingParams(dimensions=5), use_tqdm=False)
        with pytest.raises(InvalidRequestError, match="dimensions must be from 1 to 24"):
            llm.embed(TEXTS[0], pooling_params=PoolingParams(dimensions=64), use_tqdm=False)
    wanted = [narrow @ torch.tanh(wide @ state.mean(0) + bias) for state in states]
    for output, vector in zip([*outputs, short], [*wanted, wanted[0][:5]], strict=True):
        found = torch.tensor(output.outputs.embedding)
        torch.testing.assert_close(found, normalize(vector, dim=0), atol=1e-4, rtol=1e-4)


def test_a_layer_whose_weights_are_others(tmp_path: Path) -> None:
    path = make_encoder(tmp_path, "bert")
    write_modules(path, "mean", "Dense")
    write_dense(path, 2, torch.ones(24, 64), None, "torch.nn.modules.linear.Identity")
    save_file({"linear.weight": torch.ones(24, 32)}, path / "2_Dense" / "model.safetensors")
    with pytest.raises(ModelError, match=r"2_Dense/model\.safetensors has the tensors .*\[24, 32\]"):
        LLM(model=str(path), device="cpu")


def test_a_cross_encoder_scores_as_transformers_does(tmp_path: Path) -> None:
    """Two segments, cut where the pair is too long."""
    path = make_encoder(tmp_path, "bert", num_labels=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    for most in (None, 20):
        options = {} if most is None else {"truncation": True, "max_length": most}
        encoded = [
            tokenizer(TEXTS[0], text, return_tensors="pt", return_token_type_ids=True, **options) for text in TEXTS
        ]
        assert all(each["token_type_ids"].sum() > 0 for each in encoded)
        with torch.inference_mode():
            wanted = [float(model(**each).logits.sigmoid()) for each in encoded]
        with LLM(model=str(path), device="cpu") as llm:
            outputs = llm.score(TEXTS[0], TEXTS, use_tqdm=False, truncate_prompt_tokens=most)
        assert [output.outputs.score for output in outputs] == pytest.approx(wanted, abs=1e-4)
