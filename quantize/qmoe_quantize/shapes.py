"""The tensors that a ``config.json`` implies, so that a plan can be made before the weights are there.

The names and shapes are those that transformers writes; biases and norms included, since together they are
what the dense part of a packed model weighs. Where this module does not know a family, transformers is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from qmoe_codec.errors import CheckpointError

from .config import ModelConfig
from .families import family_of

MOST_TENSORS = 1_000_000  # DeepSeek-V3 has 45 thousand; a configuration is not trusted

Named = Iterator[tuple[str, tuple[int, ...]]]


class PlannedTensor(NamedTuple):
    """A tensor that a checkpoint of this configuration holds."""

    dtype: str
    shape: tuple[int, ...]


def tensors_of(config: ModelConfig) -> dict[str, PlannedTensor]:
    """Names, dtypes and shapes of the tensors of a model, from its configuration alone.

    All tensors are given the dtype that `config` names. Tensors for training or speculative decoding that
    transformers does not load are left out.

    Raises
    ------
    UnsupportedModelError
        The architecture is not supported.
    CheckpointError
        `config` lacks a value, or one is illegal, or it implies more than a million tensors.
    MissingPackageError
        transformers has to be asked, and is not installed.
    """
    family_of(config)
    kind = config.text("model_type")
    shapes: Named
    if kind == "switch_transformers":
        shapes = _switch(config)
    elif kind in _DECODERS:
        shapes = _decoder(config)
    else:
        from .upstream import shapes_of

        shapes = shapes_of(config)
    tensors: dict[str, PlannedTensor] = {}
    for name, shape in shapes:
        if len(tensors) == MOST_TENSORS:
            raise CheckpointError(
                "implies more tensors than any model has",
                file=config.file,
                field="layers, experts",
                expected=f"at most {MOST_TENSORS} tensors",
            )
        tensors[name] = PlannedTensor(config.dtype, shape)
    return tensors


def _decoder(config: ModelConfig) -> Named:
    """A decoder-only model."""
    kind = config.text("model_type")
    hidden, vocabulary = config.number("hidden_size"), config.number("vocab_size")
    attention, mixture, is_sparse = _DECODERS[kind]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for number in range(config.number("num_hidden_layers")):
        layer = f"model.layers.{number}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield from attention(config, f"{layer}.self_attn")
        if is_sparse(config, number):
            yield from mixture(config, layer)
        else:
            yield from _gated_mlp(f"{layer}.mlp", hidden, config.number("intermediate_size"))
    yield "model.norm.weight", (hidden,)
    if not config.truth("tie_word_embeddings", False):
        yield "lm_head.weight", (vocabulary, hidden)


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> Named:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _gated_mlp(
    name: str, hidden: int, width: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Named:
    gate, up, down = names
    yield from _linear(f"{name}.{gate}", width, hidden)
    yield from _linear(f"{name}.{up}", width, hidden)
    yield from _linear(f"{name}.{down}", hidden, width)


def _attention(config: ModelConfig, name: str) -> Named:
    """Grouped-query attention."""
    kind = config.text("model_type")
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    groups = config.number("num_key_value_heads", heads)
    size = config.number("head_dim", hidden // max(1, heads))
    bias = config.truth("attention_bias", kind == "gpt_oss")
    query_bias = config.truth("qkv_bias", True) if kind == "qwen2_moe" else bias
    yield from _linear(f"{name}.q_proj", heads * size, hidden, query_bias)
    yield from _linear(f"{name}.k_proj", groups * size, hidden, query_bias)
    yield from _linear(f"{name}.v_proj", groups * size, hidden, query_bias)
    yield from _linear(f"{name}.o_proj", hidden, heads * size, bias)
    if kind == "gpt_oss":
        yield f"{name}.sinks", (heads,)
    if kind == "olmoe":
        yield f"{name}.q_norm.weight", (heads * size,)
        yield f"{name}.k_norm.weight", (groups * size,)
    if kind == "qwen3_moe":
        yield f"{name}.q_norm.weight", (size,)
        yield f"{name}.k_norm.weight", (size,)


def _latent_attention(config: ModelConfig, name: str) -> Named:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    rank, key_rank = config.number("q_lora_rank", 0), config.number("kv_lora_rank")
    rotary, plain = config.number("qk_rope_head_dim"), config.number("qk_nope_head_dim")
    value = config.number("v_head_dim")
    bias = config.truth("attention_bias", False)
    if rank:
        yield from _linear(f"{name}.q_a_proj", rank, hidden, bias)
        yield f"{name}.q_a_layernorm.weight", (rank,)
        yield from _linear(f"{name}.q_b_proj", heads * (plain + rotary), rank)
    else:
        yield from _linear(f"{name}.q_proj", heads * (plain + rotary), hidden)
    yield from _linear(f"{name}.kv_a_proj_with_mqa", key_rank + rotary, hidden, bias)
    yield f"{name}.kv_a_layernorm.weight", (key_rank,)
    yield from _linear(f"{name}.kv_b_proj", heads * (plain + value), key_rank)
    yield from _linear(f"{name}.o_proj", hidden, heads * value, bias)


def _plain_mixture(config: ModelConfig, layer: str) -> Named:
    """OLMoE: a router and experts."""
    hidden = config.number("hidden_size")
    yield from _linear(f"{layer}.mlp.gate", config.experts, hidden)
    for expert in range(config.experts):
        yield from _gated_mlp(f"{layer}.mlp.experts.{expert}", hidden, config.number("intermediate_size"))


def _qwen_mixture(config: ModelConfig, layer: str) -> Named:
    """Qwen2-MoE and Qwen3-MoE: experts of their own width; in Qwen2 a shared expert with a gate."""
    hidden = config.number("hidden_size")
    yield from _linear(f"{layer}.mlp.gate", config.experts, hidden)
    for expert in range(config.experts):
        yield from _gated_mlp(f"{layer}.mlp.experts.{expert}", hidden, config.number("moe_intermediate_size"))
    if config.text("model_type") == "qwen2_moe":
        yield from _gated_mlp(
            f"{layer}.mlp.shared_expert", hidden, config.number("shared_expert_intermediate_size")
        )
        yield from _linear(f"{layer}.mlp.shared_expert_gate", 1, hidden)


def _deepseek_mixture(config: ModelConfig, layer: str) -> Named:
    """DeepSeek: shared experts in one MLP, and in V3 a correction of the router."""
    hidden, width = config.number("hidden_size"), config.number("moe_intermediate_size")
    yield from _linear(f"{layer}.mlp.gate", config.experts, hidden)
    if config.text("model_type") == "deepseek_v3":
        yield f"{layer}.mlp.gate.e_score_correction_bias", (config.experts,)
    for expert in range(config.experts):
        yield from _gated_mlp(f"{layer}.mlp.experts.{expert}", hidden, width)
    if shared := config.number("n_shared_experts", 0):
        yield from _gated_mlp(f"{layer}.mlp.shared_experts", hidden, width * shared)


def _mixtral_mixture(config: ModelConfig, layer: str) -> Named:
    """Mixtral: like OLMoE under other names."""
    hidden, width = config.number("hidden_size"), config.number("intermediate_size")
    name = f"{layer}.block_sparse_moe"
    yield from _linear(f"{name}.gate", config.experts, hidden)
    for expert in range(config.experts):
        yield from _gated_mlp(f"{name}.experts.{expert}", hidden, width, ("w1", "w3", "w2"))


def _gpt_oss_mixture(config: ModelConfig, layer: str) -> Named:
    """GPT-OSS: all experts in two tensors, transposed, gate and up in turns, with biases."""
    hidden, width, experts = config.number("hidden_size"), config.number("intermediate_size"), config.experts
    yield from _linear(f"{layer}.mlp.router", experts, hidden, bias=True)
    yield f"{layer}.mlp.experts.gate_up_proj", (experts, hidden, 2 * width)
    yield f"{layer}.mlp.experts.gate_up_proj_bias", (experts, 2 * width)
    yield f"{layer}.mlp.experts.down_proj", (experts, width, hidden)
    yield f"{layer}.mlp.experts.down_proj_bias", (experts, hidden)


def _every_layer(config: ModelConfig, number: int) -> bool:
    return True


def _qwen_step(config: ModelConfig, number: int) -> bool:
    step = max(1, config.number("decoder_sparse_step", 1))
    return number not in config.numbers("mlp_only_layers") and (number + 1) % step == 0


def _deepseek_step(config: ModelConfig, number: int) -> bool:
    step = max(1, config.number("moe_layer_freq", 1))
    return number >= config.number("first_k_dense_replace", 0) and number % step == 0


Part = Callable[[ModelConfig, str], Named]
# model_type -> attention, mixture of experts, which layers have one
_DECODERS: dict[str, tuple[Part, Part, Callable[[ModelConfig, int], bool]]] = {
    "olmoe": (_attention, _plain_mixture, _every_layer),
    "qwen2_moe": (_attention, _qwen_mixture, _qwen_step),
    "qwen3_moe": (_attention, _qwen_mixture, _qwen_step),
    "mixtral": (_attention, _mixtral_mixture, _every_layer),
    "gpt_oss": (_attention, _gpt_oss_mixture, _every_layer),
    "deepseek_v2": (_latent_attention, _deepseek_mixture, _deepseek_step),
    "deepseek_v3": (_latent_attention, _deepseek_mixture, _deepseek_step),
}


def _switch(config: ModelConfig) -> Named:
    """An encoder and a decoder of T5, some of whose feed-forward layers are mixtures."""
    hidden, vocabulary = config.number("d_model"), config.number("vocab_size")
    yield "shared.weight", (vocabulary, hidden)
    layers = config.number("num_layers")
    yield from _switch_stack(config, "encoder", layers)
    yield from _switch_stack(config, "decoder", config.number("num_decoder_layers", layers))
    if not config.truth("tie_word_embeddings", True):
        for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
            yield f"{name}.weight", (vocabulary, hidden)


def _switch_stack(config: ModelConfig, stack: str, layers: int) -> Named:
    hidden, width, heads = config.number("d_model"), config.number("d_ff"), config.number("num_heads")
    inner = heads * config.number("d_kv")
    sparse = config.number(f"num_sparse_{stack}_layers", 0)
    step = config.number(f"{stack}_sparse_step", layers // sparse if sparse else 0)
    attentions = ("SelfAttention", "EncDecAttention") if stack == "decoder" else ("SelfAttention",)
    for number in range(layers):
        block = f"{stack}.block.{number}.layer"
        for place, attention in enumerate(attentions):
            name = f"{block}.{place}.{attention}"
            for projection in ("q", "k", "v"):
                yield from _linear(f"{name}.{projection}", inner, hidden)
            yield from _linear(f"{name}.o", hidden, inner)
            if number == 0 and place == 0:
                buckets = config.number("relative_attention_num_buckets", 32)
                yield f"{name}.relative_attention_bias.weight", (buckets, heads)
            yield f"{block}.{place}.layer_norm.weight", (hidden,)
        mlp = f"{block}.{len(attentions)}"
        yield f"{mlp}.layer_norm.weight", (hidden,)
        experts = [f"{mlp}.mlp"]
        if step and (step == 1 or number % step == 1):
            yield from _linear(
                f"{mlp}.mlp.router.classifier", config.experts, hidden, config.truth("router_bias", False)
            )
            experts = [f"{mlp}.mlp.experts.expert_{expert}" for expert in range(config.experts)]
        for expert in experts:
            yield from _linear(f"{expert}.wi", width, hidden)
            yield from _linear(f"{expert}.wo", hidden, width)
    yield f"{stack}.final_layer_norm.weight", (hidden,)
