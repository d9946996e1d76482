"""Parameters, FLOPs and padded vocabulary of a model, each by one formula. No torch.

`args` are Megatron's arguments, or anything with their names: num_layers, hidden_size,
ffn_hidden_size, num_attention_heads, kv_channels, num_query_groups, group_query_attention,
qk_layernorm, swiglu, num_experts, moe_ffn_hidden_size, moe_router_topk,
untie_embeddings_and_output_weights, padded_vocab_size, seq_length, global_batch_size.
"""

from __future__ import annotations

import argparse

LLAMA_3_VOCABULARY = 128256  # ids of Llama 3's tokenizer, which the paper's models have: 2^8 * 501


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


def parameters(args: argparse.Namespace) -> tuple[int, int]:
    """(all, active for a token) of a GPTModel without biases, with RMSNorm; every layer has
    experts, or none. All pipeline and tensor-parallel ranks together.
    """
    hidden, channels, groups = args.hidden_size, args.kv_channels, query_groups(args)
    attention = 2 * hidden * channels * (args.num_attention_heads + groups)
    norms = 2 * hidden + (2 * channels if args.qk_layernorm else 0)
    tables = 2 if args.untie_embeddings_and_output_weights else 1
    rest = hidden + tables * hidden * args.padded_vocab_size  # the last norm, the tables
    if not args.num_experts:
        ffn = _matrices(args) * hidden * args.ffn_hidden_size
        dense = args.num_layers * (attention + norms + ffn) + rest
        return dense, dense
    router = args.num_experts * hidden
    expert = _matrices(args) * hidden * args.moe_ffn_hidden_size
    every = args.num_layers * (attention + norms + router + args.num_experts * expert) + rest
    return every, every - idle_parameters(args)


def idle_parameters(args: argparse.Namespace) -> int:
    """Weights of the experts that a token is not sent to, over all layers; 0 of a dense model."""
    if not args.num_experts:
        return 0
    expert = _matrices(args) * args.hidden_size * args.moe_ffn_hidden_size
    return args.num_layers * (args.num_experts - args.moe_router_topk) * expert


def query_groups(args: argparse.Namespace) -> int:
    """Heads of keys and values: fewer than of queries with --group-query-attention alone."""
    groups = args.num_query_groups if args.group_query_attention else None
    return groups or args.num_attention_heads


def flops_of_step(args: argparse.Namespace) -> float:
    """Of one iteration over the global batch, forward and backward, as Megatron counts them for
    --log-throughput (megatron/training/training.py, num_floating_point_operations).

    The s - 1 more rows of the embedding that a bag looks up are not products and not counted.
    """
    query = args.kv_channels * args.num_attention_heads
    key = args.kv_channels * query_groups(args)
    attention = args.hidden_size * (2 * query + 2 * key) + query * args.seq_length
    if args.num_experts:
        width = args.moe_ffn_hidden_size * args.moe_router_topk
    else:
        width = args.ffn_hidden_size
    ffn = _matrices(args) * args.hidden_size * width
    position = 6.0 * (
        args.num_layers * (attention + ffn) + args.hidden_size * args.padded_vocab_size
    )
    return position * args.global_batch_size * args.seq_length


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
    used = every - idle_parameters(args) + (getattr(args, "mtp_num_layers", None) or 0) * table
    if args.untie_embeddings_and_output_weights:
        used -= table
    return 6.0 * used * args.global_batch_size * args.seq_length


def _matrices(args: argparse.Namespace) -> int:
    return 3 if args.swiglu else 2
