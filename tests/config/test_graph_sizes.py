"""Which steps are captured, and what that takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.benchmark.presets import PRESETS
from shoal.config.graph_sizes import graph_bytes, graph_sizes, token_graph_sizes
from shoal.config.model_config import ModelConfig, load_model_config


def config_of(preset: str, directory: Path) -> ModelConfig:
    PRESETS[preset].shape.write(directory)
    return load_model_config(directory)


def test_sizes_of_steps_of_one_token_a_request() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 3]
    assert graph_sizes(24) == [1, 2, 4, 8, 16, 24]
    sizes = graph_sizes(300)
    assert sizes[-4:] == [256, 272, 288, 300] and sizes == sorted(set(sizes))


@pytest.mark.parametrize(("preset", "tensor_size", "most"), [("nano", 1, 8192), ("nano", 2, 512), ("batch8b", 1, 1536)])
def test_steps_with_prompts_as_far_as_launching_takes_longer(tmp_path, preset, tensor_size, most) -> None:
    config = config_of(preset, tmp_path)
    sizes = token_graph_sizes(config, tensor_size, 8192)
    assert sizes[0] == 16 and sizes[-1] == most and sizes == sorted(set(sizes))
    assert all(after <= before * 1.26 for before, after in zip(sizes, sizes[1:], strict=False) if before >= 512)
    assert token_graph_sizes(config, tensor_size, 100) == [16, 32, 64, 96]
    assert token_graph_sizes(config, tensor_size, 8) == []


def test_a_layer_of_many_weights_leaves_short_prompts(tmp_path) -> None:
    config = config_of("batch70b", tmp_path)
    assert token_graph_sizes(config, 1, 8192)[-1] == 512
    assert token_graph_sizes(config, 4, 8192)[-1] == 512


def test_bytes_are_those_of_the_largest_step_of_either_kind(tmp_path) -> None:
    config = config_of("batch8b", tmp_path)
    width = 2 * config.intermediate_size // 2 + 8 * config.hidden_size

    def numbers(num_tokens: int, num_seqs: int) -> int:
        return num_tokens * width + num_seqs * config.vocab_size // 2

    def graphs(num_seqs: int, num_tokens: int) -> int:
        return 2 * len(graph_sizes(num_seqs)) + len(token_graph_sizes(config, 2, num_tokens))

    for num_seqs, num_tokens, rows in ((64, 8192, 512), (300, 100, 300)):
        expected = 4 * numbers(rows, num_seqs) + (graphs(num_seqs, num_tokens) << 20) + (256 << 20)
        assert graph_bytes(config, 2, num_seqs, num_tokens) == expected


def test_bytes_of_experts_count_each_token_as_often_as_it_is_routed(tmp_path) -> None:
    config = config_of("batch30b-moe", tmp_path)
    assert config.experts is not None
    routed = config.experts.num_per_token * (2 * config.hidden_size + 3 * config.experts.intermediate_size)
    assert graph_bytes(config, 1, 8, 8192) > 8192 * routed * 2
