"""Layers with experts: Mixtral, Qwen2-MoE, Qwen3-MoE, GLM-4.5, gpt-oss, DeepSeek-V2 and V3 with their latent attention
(MLA).

DeepSeek-V3's checkpoint, and GLM-4.5's, hold a layer more, which predicts a second token (MTP): it is counted apart.
"""

from __future__ import annotations

import dataclasses

from shoal.cluster.plan.blocks import Attention, Reader, cache_of, gated_mlp, norms
from shoal.cluster.plan.shape import Cache, Layer, Matrix, Part, Split, Vector
from shoal.config.model_config import ModelConfig
from shoal.errors import ModelError

ARCHITECTURES = (
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Glm4MoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "GptOssForCausalLM",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeLayers:
    config: ModelConfig
    layers: list[Layer]
    apart: list[Part]
    num_experts: int
    experts_per_token: int
    expert_width: int


def build(read: Reader) -> MadeLayers:
    """Raises ModelError."""
    if read.architecture == "MixtralForCausalLM":
        return _mixtral(read)
    if read.architecture.startswith("Qwen"):
        return _qwen(read)
    if read.architecture == "GptOssForCausalLM":
        return _gpt_oss(read)
    return _deepseek(read)


def _routed(
    hidden_size: int,
    width: int,
    count: int,
    prefix: str = "mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> list[Part]:
    """The router and the experts that it chooses from."""
    router = Matrix(
        component="router",
        name=f"{prefix}.gate",
        out_features=count,
        in_features=hidden_size,
        can_quantize=False,
    )
    routed = gated_mlp(
        hidden_size, width, component="experts", prefix=f"{prefix}.experts.0", count=count, is_expert=True, names=names
    )
    return [router, *routed]


def _mixtral(read: Reader) -> MadeLayers:
    config = read.config(num_kv_heads=read.size("num_key_value_heads", 8))
    num_experts, width = read.size("num_local_experts", 8), config.intermediate_size
    window = read.raw.get("sliding_window")
    parts = (
        *Attention().parts(config),
        *_routed(config.hidden_size, width, num_experts, "block_sparse_moe", ("w1", "w3", "w2")),
        *norms(config, "input_layernorm", "post_attention_layernorm"),
    )
    return MadeLayers(
        config=config,
        layers=[Layer(parts=parts, cache=cache_of(config, window)) for _ in range(config.num_layers)],
        apart=[],
        num_experts=num_experts,
        experts_per_token=_per_token(read, num_experts, 2),
        expert_width=width,
    )


def _per_token(read: Reader, num_experts: int, default: int) -> int:
    value = read.size("num_experts_per_tok", default)
    if value > num_experts:
        raise ModelError(f"num_experts_per_tok {value} is more than the {num_experts} experts")
    return value


def _qwen(read: Reader) -> MadeLayers:
    """Qwen2-MoE has a shared expert with a gate of its own, Qwen3-MoE norms of heads; some layers may be dense."""
    is_third = read.architecture == "Qwen3MoeForCausalLM"
    # Transformers writes num_local_experts for Qwen3-MoE since its version 5.
    name = "num_experts" if "num_experts" in read.raw else "num_local_experts"
    num_experts, width = read.size(name), read.size("moe_intermediate_size")
    step, dense = read.size("decoder_sparse_step", 1), set(read.raw.get("mlp_only_layers") or [])
    is_sparse = [index not in dense and (index + 1) % step == 0 for index in range(read.size("num_hidden_layers"))]
    shared = 0 if is_third else read.size("shared_expert_intermediate_size")
    widths = [*([] if all(is_sparse) else [read.size("intermediate_size")]), *([shared] if shared else [])]
    head_dim = None if read.raw.get("head_dim") is None else read.size("head_dim")
    config = read.config(head_dim=head_dim, intermediate=widths[0] if widths else width)
    size = config.hidden_size
    attention = Attention(
        qkv_bias=config.attention_bias if is_third else bool(read.raw.get("qkv_bias", True)),
        output_bias=config.attention_bias if is_third else False,
        head_norms=is_third,
    )
    common: list[Part] = [*attention.parts(config), *norms(config, "input_layernorm", "post_attention_layernorm")]
    sparse_parts = [*common, *_routed(size, width, num_experts)]
    if shared:
        sparse_parts += gated_mlp(size, shared, component="shared_experts", prefix="mlp.shared_expert")
        sparse_parts.append(
            Matrix(
                component="router",
                name="mlp.shared_expert_gate",
                out_features=1,
                in_features=size,
                can_quantize=False,
            )
        )
    dense_parts = [*common, *gated_mlp(size, config.intermediate_size)]
    cache = cache_of(config, None)
    return MadeLayers(
        config=config,
        layers=[Layer(parts=tuple(sparse_parts if sparse else dense_parts), cache=cache) for sparse in is_sparse],
        apart=[],
        num_experts=num_experts,
        experts_per_token=_per_token(read, num_experts, 8 if is_third else 4),
        expert_width=width,
    )


def _gpt_oss(read: Reader) -> MadeLayers:
    """Biases everywhere, a sink for each head; only the experts are quantized, all of a layer in one tensor."""
    num_experts = read.size("num_local_experts" if "num_local_experts" in read.raw else "num_experts", 128)
    config = read.config(
        head_dim=read.size("head_dim", 64),
        num_kv_heads=read.size("num_key_value_heads", 8),
        windows=read.windows(128, pattern=2),
    )
    size, width, has_bias = config.hidden_size, config.intermediate_size, bool(read.raw.get("attention_bias", True))
    plain = [
        *Attention(qkv_bias=has_bias, output_bias=has_bias).parts(config),
        Matrix(component="router", name="mlp.router", out_features=num_experts, in_features=size, bias=True),
    ]
    if (read.raw.get("quantization_config") or {}).get("quant_method") == "mxfp4":
        plain = [dataclasses.replace(part, can_quantize=False) for part in plain if isinstance(part, Matrix)]
    parts: list[Part] = [
        *plain,
        Vector(component="attention", name="self_attn.sinks", size=config.num_heads),
        *gated_mlp(
            size,
            width,
            bias=True,
            is_fused=True,
            component="experts",
            prefix="mlp.experts",
            count=num_experts,
            is_expert=True,
        ),
        *norms(config, "input_layernorm", "post_attention_layernorm"),
    ]
    return MadeLayers(
        config=config,
        layers=[Layer(parts=tuple(parts), cache=cache_of(config, window)) for window in config.sliding_windows],
        apart=[],
        num_experts=num_experts,
        experts_per_token=_per_token(read, num_experts, 4),
        expert_width=width,
    )


def _deepseek(read: Reader) -> MadeLayers:
    """The first layers are dense; the others have shared experts beside the routed ones. GLM-4.5 has the same MLPs."""
    is_mla = read.architecture != "Glm4MoeForCausalLM"
    num_experts, width = read.size("n_routed_experts"), read.size("moe_intermediate_size")
    num_shared = read.count("n_shared_experts", 0 if is_mla else 1)
    num_dense, frequency = read.count("first_k_dense_replace"), read.size("moe_layer_freq", 1)
    config, attention, cache = _latent(read) if is_mla else _glm_attention(read)
    size = config.hidden_size
    common: list[Part] = [*attention, *norms(config, "input_layernorm", "post_attention_layernorm")]
    sparse_parts = [*common, *_routed(size, width, num_experts)]
    if read.architecture != "DeepseekV2ForCausalLM":
        # The router's correction, in fp32 whatever the dtype.
        sparse_parts.append(
            Vector(component="router", name="mlp.gate.e_score_correction_bias", size=num_experts, itemsize=4)
        )
    if num_shared:
        sparse_parts += gated_mlp(size, width * num_shared, component="shared_experts", prefix="mlp.shared_experts")
    dense = Layer(parts=(*common, *gated_mlp(size, config.intermediate_size)), cache=cache)
    sparse = Layer(parts=tuple(sparse_parts), cache=cache)
    layers = [sparse if index >= num_dense and index % frequency == 0 else dense for index in range(config.num_layers)]
    apart: list[Part] = []
    for _ in range(read.count("num_nextn_predict_layers")):
        apart += [*sparse.parts, *_second_token(config)]
    return MadeLayers(
        config=config,
        layers=layers,
        apart=apart,
        num_experts=num_experts,
        experts_per_token=_per_token(read, num_experts, 8),
        expert_width=width,
    )


def _second_token(config: ModelConfig) -> list[Part]:
    """What the layer that predicts a second token has besides: two norms, a projection, its own embedding and head."""
    size, vocabulary = config.hidden_size, config.vocab_size
    tables = [
        Matrix(component="mtp", name=name, out_features=out, in_features=inputs, can_quantize=False)
        for name, out, inputs in (
            ("eh_proj", size, 2 * size),
            ("embed_tokens", vocabulary, size),
            ("shared_head.head", vocabulary, size),
        )
    ]
    return [*tables, *norms(config, "enorm", "hnorm", "shared_head.norm")]


def _latent(read: Reader) -> tuple[ModelConfig, list[Part], Cache]:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): a token's cache is one latent vector and one rotary
    key for all heads. kv_b_proj is multiplied into queries and outputs, so that decoding attends over the latent."""
    nope, rope, value = read.size("qk_nope_head_dim"), read.size("qk_rope_head_dim"), read.size("v_head_dim")
    latent, num_heads = read.size("kv_lora_rank"), read.size("num_attention_heads")
    config = read.config(head_dim=nope + rope, num_kv_heads=num_heads)
    size, query = config.hidden_size, num_heads * (nope + rope)
    bias = config.attention_bias
    parts: list[Part] = []

    def add(name: str, out: int, inputs: int, split: Split = Split.WHOLE, bias: bool = False) -> None:
        parts.append(
            Matrix(
                component="attention",
                name=f"self_attn.{name}",
                out_features=out,
                in_features=inputs,
                split=split,
                bias=bias,
            )
        )

    if rank := read.count("q_lora_rank"):
        add("q_a_proj", rank, size, bias=bias)
        parts.append(Vector(component="norms", name="self_attn.q_a_layernorm", size=rank))
        add("q_b_proj", query, rank, Split.OUT)
    else:
        add("q_proj", query, size, Split.OUT)
    add("kv_a_proj_with_mqa", latent + rope, size, bias=bias)
    parts.append(Vector(component="norms", name="self_attn.kv_a_layernorm", size=latent))
    add("kv_b_proj", num_heads * (nope + value), latent, Split.OUT)
    add("o_proj", size, num_heads * value, Split.IN, bias)
    cache = Cache(
        num_heads=1,
        width=latent + rope,
        window=None,
        num_query_heads=num_heads,
        query_width=2 * latent + rope,
        is_latent=True,
    )
    return config, parts, cache


def _glm_attention(read: Reader) -> tuple[ModelConfig, list[Part], Cache]:
    head_dim = None if read.raw.get("head_dim") is None else read.size("head_dim")
    config = read.config(head_dim=head_dim)
    attention = Attention(qkv_bias=config.attention_bias, head_norms=bool(read.raw.get("use_qk_norm", False)))
    return config, attention.parts(config), cache_of(config, None)
