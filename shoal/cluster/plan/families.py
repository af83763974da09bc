"""From a config.json to a ModelShape: one function a family, in the names of the checkpoint's modules.

Llama, Mistral, Qwen2, Qwen3 and OPT are read by `config.model_config`, as the engine reads them; here stand the others.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.cluster.plan import experts
from shoal.cluster.plan.blocks import Attention, Reader, cache_of, gated_mlp, matrix, norms, plain_mlp
from shoal.cluster.plan.formats import Quantization, quantization_of
from shoal.cluster.plan.shape import Layer, Matrix, ModelShape, Part, Split, Vector, same_objects
from shoal.config.families import ENCODERS
from shoal.config.model_config import SUPPORTED_ARCHITECTURES, ModelConfig, load_model_config
from shoal.config.model_path import resolve_model_path
from shoal.errors import ModelError


def read_shape(model: str, quantization: str | None = None) -> tuple[ModelShape, Quantization | None]:
    """model: a directory, its config.json, shoal-tiny, or a name in the local Hugging Face cache. Reads nothing else.

    Raises ModelError for a model that is missing, broken or of an architecture that is not known; ConfigError for a
    quantization that contradicts it.
    """
    path = Path(model).expanduser()
    directory = path.parent if path.name == "config.json" and path.is_file() else resolve_model_path(model)
    raw = read_config(directory / "config.json")
    architecture = _architecture(raw, directory)
    try:
        config = load_model_config(directory) if architecture in SUPPORTED_ARCHITECTURES else None
        if architecture in _BUILDERS:
            # The engine's reader brings the part of a config that is for text to its top.
            read = raw if config is None else config.raw
            shape = _BUILDERS[architecture](Reader(read, architecture, str(directory)))
            # What the engine reads itself decides about degrees and stages.
            shape = shape if config is None else dataclasses.replace(shape, config=config)
        else:
            assert config is not None
            shape = _opt(config) if architecture == "OPTForCausalLM" else _llama_like(config)
        stated = raw.get("quantization_config") or raw.get("compression_config")
        if config is not None and config.quantization is not None:  # or a file beside says so
            stated = config.quantization.raw
        found = quantization_of(stated, quantization)
    except ModelError as error:
        where = str(directory / "config.json")
        raise (error if where in str(error) else ModelError(f"{where}: {error}")) from None
    return (shape if found is None else quantize(shape, found)), found


def read_config(path: Path) -> dict[str, Any]:
    """Raises ModelError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{str(path.parent)!r} has no config.json; it must be a Hugging Face model directory"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} must hold a JSON object; found {type(raw).__name__}")
    return raw


def known_architectures() -> list[str]:
    """Encoders fit any GPU, and have no cache: there is nothing to plan."""
    return list(dict.fromkeys((*(name for name in SUPPORTED_ARCHITECTURES if name not in ENCODERS), *_BUILDERS)))


def _architecture(raw: dict[str, Any], directory: Path) -> str:
    found = raw.get("architectures") or []
    names = [found] if isinstance(found, str) else [str(name) for name in found]
    for name in names:
        if name in known_architectures():
            return name
    if not names:
        for architecture, model_type in SUPPORTED_ARCHITECTURES.items():
            if model_type == raw.get("model_type"):
                return architecture
    shown = ", ".join(names) or f"none (model_type {raw.get('model_type')!r})"
    raise ModelError(
        f"{directory / 'config.json'}: architecture {shown} is not known here; known: "
        + ", ".join(known_architectures())
    )


def quantize(shape: ModelShape, quantization: Quantization) -> ModelShape:
    """The same shape with the matrices that the checkpoint quantizes in its format."""

    def held(part: Part, prefix: str) -> Part:
        if not isinstance(part, Matrix) or not part.can_quantize or quantization.config.keeps(f"{prefix}{part.name}"):
            return part
        return dataclasses.replace(part, format=quantization.format)

    layers = same_objects(
        dataclasses.replace(layer, parts=tuple(held(part, f"model.layers.{index}.") for part in layer.parts))
        for index, layer in enumerate(shape.layers)
    )
    prefix = f"model.layers.{len(layers)}."
    head = shape.head
    if quantization.config.quantizes_head:
        head = dataclasses.replace(head, format=quantization.format)
    last = tuple(head if part == shape.head else part for part in shape.last)
    apart = tuple(held(part, prefix) for part in shape.apart)
    return dataclasses.replace(shape, layers=layers, last=last, head=head, apart=apart)


# --- what the engine reads itself --------------------------------------------------------------------------------


def _llama_like(config: ModelConfig) -> ModelShape:
    """Llama, Mistral, Qwen2, Qwen3 and the first Qwen (`models/llama.py`, `qwen2.py`, `qwen3.py`, `qwen.py`)."""
    attention = Attention(
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias and config.architecture not in ("Qwen2ForCausalLM", "QWenLMHeadModel"),
        head_norms=config.architecture == "Qwen3ForCausalLM",
    )
    mlp = gated_mlp(config.hidden_size, config.intermediate_size, bias=bool(config.raw.get("mlp_bias", False)))
    parts = (*attention.parts(config), *mlp, *norms(config, "input_layernorm", "post_attention_layernorm"))
    return _assemble(config, [Layer(parts=parts, cache=cache_of(config, window)) for window in config.sliding_windows])


def _assemble(config: ModelConfig, layers: list[Layer], *, head_bias: bool = False, **more: Any) -> ModelShape:
    """Embedding, layers, norm, head: what all but OPT have in common."""
    embedding = matrix("embedding", "model.embed_tokens", config.vocab_size, config.hidden_size, Split.VOCABULARY)
    head = matrix("head", "lm_head", config.vocab_size, config.hidden_size, Split.VOCABULARY, bias=head_bias)
    last: list[Part] = [Vector(component="norms", name="model.norm", size=config.hidden_size)]
    if not config.tie_word_embeddings:
        last.append(head)
    return ModelShape(
        config=config, first=(embedding,), layers=same_objects(layers), last=tuple(last), head=head, **more
    )


def _opt(config: ModelConfig) -> ModelShape:
    """`models/opt.py`: learned positions, LayerNorm with bias, a plain MLP; the 350M form projects in and out."""
    raw, size = config.raw, config.hidden_size
    width = int(raw.get("word_embed_proj_dim") or size)
    affine = bool(raw.get("layer_norm_elementwise_affine", True))
    norm_size = 2 * size if affine else 0
    attention = Attention(qkv_bias=config.attention_bias, output_bias=config.attention_bias, output_name="out_proj")
    parts: list[Part] = [
        *attention.parts(config),
        *plain_mlp(size, config.intermediate_size, bias=config.attention_bias),
    ]
    parts += [
        Vector(component="norms", name=name, size=norm_size) for name in ("self_attn_layer_norm", "final_layer_norm")
    ]
    first: list[Part] = [
        matrix("embedding", "model.decoder.embed_tokens", config.vocab_size, width, Split.VOCABULARY),
        matrix("embedding", "model.decoder.embed_positions", config.max_position_embeddings + 2, size),
    ]
    last: list[Part] = []
    if width != size:
        first.append(matrix("embedding", "model.decoder.project_in", size, width))
        last.append(matrix("head", "model.decoder.project_out", width, size))
    if raw.get("do_layer_norm_before", True) and not raw.get("_remove_final_layer_norm", False):
        last.append(Vector(component="norms", name="model.decoder.final_layer_norm", size=norm_size))
    head = matrix("head", "lm_head", config.vocab_size, width, Split.VOCABULARY)
    if not config.tie_word_embeddings:
        last.append(head)
    layers = [Layer(parts=tuple(parts), cache=cache_of(config, None)) for _ in range(config.num_layers)]
    return ModelShape(config=config, first=tuple(first), layers=same_objects(layers), last=tuple(last), head=head)


# --- dense families that the engine does not read yet ------------------------------------------------------------


def _gemma(read: Reader) -> ModelShape:
    """Gemma 1 to 3, text only. The second and third normalise after each block too, and see windows in most layers."""
    generation = {"GemmaForCausalLM": 1, "Gemma2ForCausalLM": 2}.get(read.architecture, 3)
    windows: list[int | None] = [None] * read.size("num_hidden_layers")
    if generation > 1:
        windows = read.windows(4096, pattern=2 if generation == 2 else read.size("sliding_window_pattern", 6))
    config = read.config(head_dim=read.size("head_dim", 256), tied=True, windows=windows)
    attention = Attention(qkv_bias=config.attention_bias, output_bias=config.attention_bias, head_norms=generation == 3)
    names = ["input_layernorm", "post_attention_layernorm"]
    if generation > 1:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    parts = (
        *attention.parts(config),
        *gated_mlp(config.hidden_size, config.intermediate_size),
        *norms(config, *names),
    )
    return _assemble(config, [Layer(parts=parts, cache=cache_of(config, window)) for window in config.sliding_windows])


def _phi(read: Reader) -> ModelShape:
    """Phi 1 and 2: one LayerNorm a layer, biases everywhere, also at the head."""
    config = read.config(norm="layer_norm_eps")
    size = config.hidden_size
    parts: list[Part] = [*Attention(qkv_bias=True, output_bias=True, output_name="dense").parts(config)]
    parts += plain_mlp(size, config.intermediate_size, bias=True)
    parts.append(Vector(component="norms", name="input_layernorm", size=2 * size))
    if read.raw.get("qk_layernorm"):
        for name in ("q_layernorm", "k_layernorm"):
            parts.append(Vector(component="norms", name=f"self_attn.{name}", size=2 * config.head_dim))
    shape = _assemble(
        config,
        [Layer(parts=tuple(parts), cache=cache_of(config, None)) for _ in range(config.num_layers)],
        head_bias=True,
    )
    norm = Vector(component="norms", name="model.final_layernorm", size=2 * size)
    return dataclasses.replace(shape, last=(norm, *shape.last[1:]))


def _phi3(read: Reader) -> ModelShape:
    """Phi 3 and 4: Llama with fused matrices."""
    window = read.raw.get("sliding_window")
    config = read.config(windows=[window] * read.size("num_hidden_layers"))
    parts = (
        *Attention(is_fused=True).parts(config),
        *gated_mlp(config.hidden_size, config.intermediate_size, is_fused=True),
        *norms(config, "input_layernorm", "post_attention_layernorm"),
    )
    return _assemble(config, [Layer(parts=parts, cache=cache_of(config, window)) for window in config.sliding_windows])


def _glm(read: Reader) -> ModelShape:
    """GLM-4 in the Transformers form; the 0414 models normalise after each block too."""
    config = read.config(head_dim=read.size("head_dim", 128))
    names = ["input_layernorm", "post_attention_layernorm"]
    if read.architecture == "Glm4ForCausalLM":
        names += ["post_self_attn_layernorm", "post_mlp_layernorm"]
    parts = (
        *Attention(qkv_bias=config.attention_bias).parts(config),
        *gated_mlp(config.hidden_size, config.intermediate_size, is_fused=True),
        *norms(config, *names),
    )
    return _assemble(config, [Layer(parts=parts, cache=cache_of(config, None)) for _ in range(config.num_layers)])


def _moe(read: Reader) -> ModelShape:
    """Whatever has experts: `experts` makes the layers."""
    made = experts.build(read)
    return _assemble(
        made.config,
        made.layers,
        apart=tuple(made.apart),
        num_experts=made.num_experts,
        experts_per_token=made.experts_per_token,
        expert_width=made.expert_width,
    )


_BUILDERS: dict[str, Callable[[Reader], ModelShape]] = {
    **dict.fromkeys(
        ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"), _gemma
    ),
    "PhiForCausalLM": _phi,
    "Phi3ForCausalLM": _phi3,
    **dict.fromkeys(("GlmForCausalLM", "Glm4ForCausalLM"), _glm),
    **dict.fromkeys(experts.ARCHITECTURES, _moe),
}
