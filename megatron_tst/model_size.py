"""Parameters, FLOPs and padded vocabulary of a model, each by one formula. No torch.

`args` are Megatron's arguments, or anything with their names. These must be there: num_layers,
hidden_size, ffn_hidden_size, num_attention_heads, kv_channels, num_query_groups,
group_query_attention, qk_layernorm, swiglu, num_experts, untie_embeddings_and_output_weights,
padded_vocab_size; with experts moe_ffn_hidden_size and moe_router_topk; for FLOPs seq_length and
global_batch_size. A name that is absent stands for what a Llama has: no biases, RMSNorm, rotary
positions, no latent attention, experts in every layer, no shared ones, no multi-token prediction.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

LLAMA_3_VOCABULARY = 128256  # ids of Llama 3's tokenizer, which the paper's models have: 2^8 * 501
# Blocks of a HybridModel that are counted here, by Megatron's symbol (hybrid_layer_allocation.py,
# Symbols): attention, latent attention, dense MLP, experts.
HYBRID_BLOCKS = "*+-E"
_UNCOUNTED = (
    *("experimental_attention_variant", "heterogeneous_layers_config_path"),
    *("heterogeneous_layers_config_encoded_json", "heterogeneous_block_specs"),
)


@dataclass(frozen=True)
class Blocks:
    """How many of each kind there are. A layer of GPTModel is an attention and an MLP.

    Args:
        attention: self-attention with keys and values of their own.
        latent: multi-latent attention.
        dense: MLPs that every token goes through.
        experts: mixtures of experts.
    """

    attention: int
    latent: int
    dense: int
    experts: int

    @property
    def every(self) -> int:
        """Of all kinds."""
        return self.attention + self.latent + self.dense + self.experts


@dataclass(frozen=True)
class Size:
    """Parameters of a model by where they are, all ranks together.

    Args:
        decoder: its layers, and the norm behind the last.
        decoder_idle: of these, weights of experts that a token is not sent to.
        mtp: layers of multi-token prediction, without the tables, which are the model's own.
        mtp_idle: of these, as above.
        embedding: of tokens, and of positions where they are learned.
        output: the output layer; 0 where it is the embedding.
    """

    decoder: int
    decoder_idle: int
    mtp: int
    mtp_idle: int
    embedding: int
    output: int

    @property
    def every(self) -> int:
        """All that Megatron builds."""
        return self.decoder + self.mtp + self.embedding + self.output

    @property
    def active(self) -> int:
        """Those of `every` that one token is multiplied with. An embedding that is a table of its
        own is looked up, so it is not among them.
        """
        products = self.output or self.embedding
        return self.decoder - self.decoder_idle + self.mtp - self.mtp_idle + products


def padded_vocabulary(size: int, divisible_by: int = 128, tensor_parallel: int = 1) -> int:
    """Rows of the embedding: ids, padded as Megatron does when it builds the tokenizer.

    Args:
        size: ids of the tokenizer.
        divisible_by: --make-vocab-size-divisible-by.
        tensor_parallel: --tensor-model-parallel-size.

    Source: megatron/core/tokenizers/utils/build_tokenizer.py, vocab_size_with_padding.
    """
    multiple = divisible_by * tensor_parallel
    return -(-size // multiple) * multiple


def uncounted(args: argparse.Namespace) -> list[str]:
    """Arguments that make a model which is not counted here, as a user writes them; [] mostly."""
    pattern = _get(args, "hybrid_layer_pattern") or ""
    others = sorted(set(pattern) - set(HYBRID_BLOCKS) - set("|/"))
    found = [f"--hybrid-layer-pattern with {' '.join(others)}"] if others else []
    found += [f"--{name.replace('_', '-')}" for name in _UNCOUNTED if _get(args, name)]
    return found


def expert_layers(args: argparse.Namespace) -> list[int]:
    """1 for each layer with experts, 0 for each without, from --moe-layer-freq, which is a list of
    these or n: experts in the first of every n layers.
    """
    if not args.num_experts:
        return [0] * args.num_layers
    frequency = _get(args, "moe_layer_freq", 1)
    if isinstance(frequency, int):
        return [int(layer % frequency == 0) for layer in range(args.num_layers)]
    return list(frequency)


def blocks(args: argparse.Namespace) -> tuple[Blocks, Blocks]:
    """(of the decoder, of one layer of multi-token prediction).

    Source: GPTModel's MTP layer is of the last layer's kind (gpt_layer_specs.py); HybridModel's
    pattern has its own behind a slash (hybrid_layer_allocation.py).
    """
    pattern = _get(args, "hybrid_layer_pattern")
    if pattern:
        main, *heads = pattern.split("/")
        return _of_pattern(main), _of_pattern(heads[0] if heads else "")
    if args.num_experts:
        layers = expert_layers(args)
        experts, last = sum(layers), layers[-1]
    else:  # without a list: a plan may be of a trillion layers
        experts = last = 0

    def of(layers, experts):
        latent = layers if _get(args, "multi_latent_attention") else 0
        return Blocks(layers - latent, latent, layers - experts, experts)

    return of(args.num_layers, experts), of(1, last)


def _of_pattern(pattern: str) -> Blocks:
    return Blocks(*(pattern.count(symbol) for symbol in HYBRID_BLOCKS))


def size(args: argparse.Namespace) -> Size:
    """Parameters of a GPTModel, or of a HybridModel of attention, MLPs and experts.

    A router's expert bias is a buffer in Megatron, and not among them.
    """
    hidden, norm = args.hidden_size, _norm(args)
    decoder, head = blocks(args)
    heads = _mtp_layers(args)
    # of MTP: norms of the embedding, of the hidden states and of the layer's output; one product
    # that takes both
    around = 3 * norm * hidden + 2 * hidden * hidden
    table = hidden * args.padded_vocab_size
    learned = _get(args, "position_embedding_type") == "learned_absolute"
    return Size(
        decoder=_of_blocks(args, decoder) + norm * hidden,
        decoder_idle=decoder.experts * _idle_of_a_layer(args),
        mtp=heads * (_of_blocks(args, head) + around),
        mtp_idle=heads * head.experts * _idle_of_a_layer(args),
        embedding=table + (hidden * args.max_position_embeddings if learned else 0),
        output=table if args.untie_embeddings_and_output_weights else 0,
    )


def parameters(args: argparse.Namespace) -> tuple[int, int]:
    """(all, those that a token is multiplied with): Size's `every` and `active`. All pipeline and
    tensor-parallel ranks together, multi-token prediction included.
    """
    found = size(args)
    return found.every, found.active


def idle_parameters(args: argparse.Namespace) -> int:
    """Weights of the experts that a token is not sent to, over all layers; 0 of a dense model."""
    if not args.num_experts:
        return 0
    decoder, head = blocks(args)
    return (decoder.experts + _mtp_layers(args) * head.experts) * _idle_of_a_layer(args)


def _mtp_layers(args) -> int:
    """Those that are built: one where it is used again and again."""
    heads = _get(args, "mtp_num_layers") or 0
    return min(heads, 1) if _get(args, "mtp_use_repeated_layer") else heads


def _of_blocks(args, count: Blocks) -> int:
    found = count.every * _norm(args) * args.hidden_size
    found += count.dense * _mlp(args, args.hidden_size, args.ffn_hidden_size)
    if count.attention:
        found += count.attention * _attention(args)
    if count.latent:
        found += count.latent * _latent_attention(args)
    return found + (count.experts * _mixture(args) if count.experts else 0)


def _attention(args) -> int:
    """Products, their biases, and norms of queries and keys (core/transformer/attention.py)."""
    queries = args.num_attention_heads * args.kv_channels
    gate = queries if _get(args, "attention_output_gate") else 0
    into = queries + 2 * query_groups(args) * args.kv_channels + gate
    found = args.hidden_size * (into + queries) + _behind_attention(args)
    if _get(args, "add_qkv_bias") or _get(args, "add_bias_linear"):
        found += into
    return found + (2 * _norm(args) * args.kv_channels if args.qk_layernorm else 0)


def _latent_attention(args) -> int:
    """The same of multi-latent attention (multi_latent_attention.py): no bias of the products into
    it, norms of the latents. Without a rank of queries megatron-core 0.19.2 has a norm of what the
    product of queries takes (mla_qk_norm_config.py), which DeepSeek's models have not.
    """
    ranks = (args.q_lora_rank or args.hidden_size) + args.kv_lora_rank
    norms = _norm(args) * ranks if args.qk_layernorm else 0
    return _latent_products(args) + norms + _behind_attention(args)


def _behind_attention(args) -> int:
    """The bias of the output product, and attention sinks."""
    bias = args.hidden_size if _get(args, "add_bias_linear") else 0
    return bias + (args.num_attention_heads if _get(args, "softmax_type") == "learnable" else 0)


def _latent_products(args) -> int:
    """Weights of the products of multi-latent attention."""
    hidden, heads, rope = args.hidden_size, args.num_attention_heads, args.qk_pos_emb_head_dim
    query, rank = heads * (args.qk_head_dim + rope), args.kv_lora_rank
    if args.q_lora_rank is None:
        found = hidden * query
    else:
        found = args.q_lora_rank * (hidden + query)
    found += hidden * (rank + rope) + rank * heads * (args.qk_head_dim + args.v_head_dim)
    return found + heads * args.v_head_dim * hidden


def _mlp(args, hidden: int, width: int) -> int:
    """Of an MLP or an expert: both products, and their biases."""
    into = (_matrices(args) - 1) * width  # SwiGLU: gate and value
    bias = into + hidden if _get(args, "add_bias_linear") else 0
    return hidden * (into + width) + bias


def _mixture(args) -> int:
    """Router, experts and what lies beside them in a layer.

    Source: core/transformer/moe/{router,moe_layer,shared_experts}.py.
    """
    hidden, latent = args.hidden_size, _get(args, "moe_latent_size")
    found = args.num_experts * (hidden + (1 if _get(args, "add_bias_linear") else 0))
    found += args.num_experts * _mlp(args, latent or hidden, args.moe_ffn_hidden_size)
    if latent:
        found += 2 * hidden * latent + (hidden + latent if _get(args, "add_bias_linear") else 0)
    if shared := _get(args, "moe_shared_expert_intermediate_size"):
        found += _mlp(args, hidden, shared)
        found += hidden if _get(args, "moe_shared_expert_gate") else 0
    return found


def _idle_of_a_layer(args) -> int:
    if not args.num_experts:
        return 0
    hidden = _get(args, "moe_latent_size") or args.hidden_size
    expert = _mlp(args, hidden, args.moe_ffn_hidden_size)
    return (args.num_experts - args.moe_router_topk) * expert


def query_groups(args: argparse.Namespace) -> int:
    """Heads of keys and values: fewer than of queries with --group-query-attention alone."""
    groups = args.num_query_groups if args.group_query_attention else None
    return groups or args.num_attention_heads


def flops_of_step(args: argparse.Namespace) -> float:
    """Of one iteration over the global batch, forward and backward, as Megatron counts them for
    --log-throughput (megatron/training/training.py, num_floating_point_operations).

    Two things are counted here that Megatron leaves out: latent attention in a HybridModel, and the
    gate's product of --quick-geglu. The s - 1 more rows of the embedding that a bag looks up are no
    products, and neither counts them.
    """
    hybrid = bool(_get(args, "hybrid_layer_pattern"))
    decoder, head = blocks(args)
    heads = _get(args, "mtp_num_layers") or 0
    hidden = args.hidden_size

    def both(kind):
        return getattr(decoder, kind) + heads * getattr(head, kind)

    products = both("dense") * _matrices(args) * hidden * args.ffn_hidden_size
    if count := both("attention"):
        products += count * _attention_products(args)
    if count := both("latent"):
        products += count * _latent_attention_products(args)
    if count := both("experts"):
        products += count * _mixture_products(args)
    if not hybrid:  # Megatron counts MTP's norms and product of a GPTModel alone
        products += heads * (3 * hidden + 2 * hidden * hidden)
    products += (1 + heads) * hidden * args.padded_vocab_size
    return 6.0 * products * args.global_batch_size * args.seq_length


def _attention_products(args) -> int:
    """Multiplications of a position, those with the other positions included: half of them, as the
    mask is causal.
    """
    query = args.kv_channels * args.num_attention_heads
    key = args.kv_channels * query_groups(args)
    # Megatron does not count a HybridModel's gate
    gate = _get(args, "attention_output_gate") and not _get(args, "hybrid_layer_pattern")
    wide = 2 * query + 2 * key + (query if gate else 0)
    return args.hidden_size * wide + query * args.seq_length


def _latent_attention_products(args) -> float:
    """The same of multi-latent attention; Megatron counts a product for each latent, for its
    norm.
    """
    rows = args.qk_head_dim + args.qk_pos_emb_head_dim + args.v_head_dim
    norms = (args.q_lora_rank or 0) + args.kv_lora_rank
    across = args.seq_length * args.num_attention_heads * rows / 2
    return _latent_products(args) + norms + across


def _mixture_products(args) -> int:
    """As Megatron counts them: without the router."""
    hidden, latent = args.hidden_size, _get(args, "moe_latent_size")
    width = args.moe_ffn_hidden_size * args.moe_router_topk
    found = _matrices(args) * (latent or hidden) * width
    found += 2 * hidden * latent if latent else 0
    shared = _get(args, "moe_shared_expert_intermediate_size") or 0
    return found + _matrices(args) * hidden * shared


def flops_6nd(every: int, args: argparse.Namespace) -> float:
    """Of one iteration by the rule of thumb 6 N D: D positions, bags or tokens alike, and N
    parameters that a position is multiplied with. Attention's own products are left out.

    N is all that the model has, less the input embedding (unless the output layer shares it) and
    the experts that a token is not sent to; each head of multi-token prediction uses the output
    layer once more.

    Args:
        every: all parameters, as Megatron counts them, over its model-parallel ranks.
        args: beside the names above `mtp_num_layers`, or none.
    """
    table = args.hidden_size * args.padded_vocab_size
    used = every - idle_parameters(args) + (_get(args, "mtp_num_layers") or 0) * table
    if args.untie_embeddings_and_output_weights:
        used -= table
    return 6.0 * used * args.global_batch_size * args.seq_length


def _matrices(args: argparse.Namespace) -> int:
    return 3 if args.swiglu or _get(args, "quick_geglu") else 2


def _norm(args: argparse.Namespace) -> int:
    """Parameters of a norm for each channel: LayerNorm has a bias."""
    return 2 if _get(args, "normalization") == "LayerNorm" else 1


def _get(args: argparse.Namespace, name: str, default: Any = None) -> Any:
    return getattr(args, name, default)
