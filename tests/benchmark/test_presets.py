from __future__ import annotations

from pathlib import Path

import pytest

from shoal.benchmark.plan import Wish, cache_variables, plan
from shoal.benchmark.presets import PRESETS
from shoal.benchmark.workload import Workload, draw_requests, parse_range
from shoal.cli.bench_options import BENCH_ENGINE_SECTIONS
from shoal.config.knobs import KnobTable
from shoal.config.model_config import load_model_config
from shoal.errors import ConfigError

QWEN, QWEN_MOE, LLAMA_8B, LLAMA_70B, QWEN_GPTQ = (
    ("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, True),
    ("qwen3_moe", 48, 2048, 6144, 32, 4, 128, 151936, False),
    ("llama", 32, 4096, 14336, 32, 8, 128, 128256, False),
    ("llama", 80, 8192, 28672, 64, 8, 128, 128256, False),
    ("qwen2", 64, 5120, 27648, 40, 8, 128, 152064, False),
)
# Name -> shape, requests, prompt, output, temperature, tensor parallel size.
ROWS = {
    "small1": (QWEN, 1, (128, 128), (512, 512), 0, 1),
    "nano": (QWEN, 256, (100, 1024), (100, 1024), 1, 1),
    "lat8b": (LLAMA_8B, 1, (128, 128), (256, 256), 0, 1),
    "batch8b": (LLAMA_8B, 256, (100, 1024), (100, 512), 0, 1),
    "prefill8b": (LLAMA_8B, 32, (4096, 4096), (1, 1), 0, 1),
    "lat30b-moe": (QWEN_MOE, 1, (128, 128), (256, 256), 0, 1),
    "batch30b-moe": (QWEN_MOE, 256, (100, 1024), (100, 512), 0, 1),
    "gptq1": (QWEN_GPTQ, 1, (128, 128), (128, 128), 0, 1),
    "gptq64": (QWEN_GPTQ, 64, (128, 512), (256, 256), 0, 1),
    "lat70b": (LLAMA_70B, 1, (128, 128), (128, 128), 0, 4),
    "batch70b": (LLAMA_70B, 128, (100, 1024), (100, 256), 0, 4),
}
ROWS |= {name: (*ROWS[name.removesuffix("-tp2")][:5], 2) for name in ("lat8b-tp2", "batch8b-tp2")}
ROWS |= {name: ROWS[name.removeprefix("det-")] for name in ("det-lat8b", "det-batch8b", "det-prefill8b")}
DEFAULT = Workload(2, (4, 4), (4, 4))


def engine_options(**changes):
    sections = KnobTable(BENCH_ENGINE_SECTIONS).build(changes)
    return {name: value for section in sections for name, value in vars(section).items()}


def test_every_row_is_there():
    assert set(PRESETS) == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_preset_is_a_model_that_can_be_read(name):
    shape, num_requests, prompt, output, temperature, tensor_size = ROWS[name]
    with plan(Wish(engine_options(), DEFAULT, name)) as planned:
        model = load_model_config(planned.options["model"])
    found = (model.model_type, model.num_layers, model.hidden_size, model.intermediate_size, model.num_heads)
    found += (model.num_kv_heads, model.head_dim, model.vocab_size, model.tie_word_embeddings)
    assert found == shape and model.dtype == "bfloat16"
    assert planned.workload == Workload(num_requests, prompt, output, temperature)
    options = planned.options
    assert (options["tensor_parallel_size"], options["load_format"]) == (tensor_size, "dummy")
    assert options["enable_prefix_caching"] is False and options["skip_tokenizer_init"] is True
    assert options["max_model_len"] == prompt[1] + output[1]
    assert options["deterministic"] is (True if name.startswith("det-") else None)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("scale", [0.001, 0.03, 0.3])
def test_a_scaled_preset_is_a_model_too(name, scale):
    with plan(Wish(engine_options(), DEFAULT, name, scale)) as planned:
        model = load_model_config(planned.options["model"])
    whole = PRESETS[name]
    assert model.num_heads % model.num_kv_heads == 0 and model.head_dim == whole.shape.head_dim
    assert model.num_heads // model.num_kv_heads == whole.shape.num_heads // whole.shape.num_kv_heads
    assert 1 <= model.num_layers < whole.shape.num_layers and model.hidden_size < whole.shape.hidden_size
    assert planned.workload.num_requests == max(1, round(whole.workload.num_requests * scale))


def test_what_is_said_counts_more_than_the_preset():
    wish = Wish(
        engine_options(tensor_parallel_size=2, max_model_len=999),
        DEFAULT,
        "batch70b",
        num_requests=3,
        prompt_tokens=(7, 8),
        output_tokens=(9, 9),
        temperature=0.5,
    )
    with plan(wish) as planned:
        assert planned.workload == Workload(3, (7, 8), (9, 9), 0.5)
        assert (planned.options["tensor_parallel_size"], planned.options["max_model_len"]) == (2, 999)


@pytest.mark.parametrize(("name", "said"), [("det-lat8b", False), ("lat8b", True), ("det-lat8b", True)])
def test_a_row_is_measured_deterministic_or_not_as_is_said(name, said):
    with plan(Wish(engine_options(deterministic=said), DEFAULT, name)) as planned:
        assert planned.options["deterministic"] is said


def test_a_cold_start_finds_no_kernels_of_an_earlier_one(tmp_path, monkeypatch):
    """Whatever compiles kernels, or tries which are fast, keeps them where the benchmark says; models stay."""
    monkeypatch.setenv("HF_HOME", "/models")
    variables = cache_variables(tmp_path)
    assert variables.pop("HF_HUB_CACHE") == "/models/hub"
    assert {"SHOAL_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "TORCHINDUCTOR_CACHE_DIR"} <= set(variables)
    assert all(Path(folder).parent == tmp_path for folder in variables.values())
    assert len(set(variables.values())) == len(variables)


def test_without_a_preset():
    with plan(Wish(engine_options(), DEFAULT, num_requests=5)) as planned:
        assert planned.options["model"] == "shoal-tiny" and planned.options["tensor_parallel_size"] == 1
        assert planned.workload == Workload(5, (4, 4), (4, 4)) and planned.vocab_size == 4096


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Wish(engine_options(model="/m"), DEFAULT, "nano"), "brings its own model"),
        (Wish(engine_options(load_format="safetensors"), DEFAULT, "nano"), "has random weights"),
        (Wish(engine_options(), DEFAULT, scale=0.5), "name one with --preset"),
    ],
)
def test_contradictions_are_refused(wish, message):
    with pytest.raises(ConfigError, match=message), plan(wish):
        pass


def test_the_drawn_requests_have_the_lengths():
    drawn = draw_requests(Workload(300, (3, 6), (2, 3)), vocab_size=9, seed=4)
    assert {len(one.prompt) for one in drawn} == {3, 4, 5, 6} and {one.num_output for one in drawn} == {2, 3}
    assert {token for one in drawn for token in one.prompt} == set(range(2, 9))
    assert drawn == draw_requests(Workload(300, (3, 6), (2, 3)), vocab_size=9, seed=4)


@pytest.mark.parametrize(("text", "bounds"), [("128", (128, 128)), ("100-1024", (100, 1024)), (" 5–6 ", (5, 6))])
def test_ranges(text, bounds):
    assert parse_range(text, "x") == bounds


@pytest.mark.parametrize("text", ["", "0", "5-2", "-3", "a", "1-2-3", "1.5"])
def test_wrong_ranges(text):
    with pytest.raises(ConfigError, match="--prompt-tokens must be a number of tokens or a range"):
        parse_range(text, "--prompt-tokens")
