#!/usr/bin/env bash
# 10B-A1B mixture of experts, the paper's largest. 49,983 steps of 8M positions, of which 12,483 with bags of 16: 2T tokens.
#
#     DRY_RUN=1 examples/moe_10b_a1b.sh                                       print and validate the command, on any machine
#     NNODES=8 GPU=b200 DATA_PATH="0.5 data/dclm_text_document 0.5 data/fineweb_edu_text_document" examples/moe_10b_a1b.sh
#     BASELINE=1 STEPS=125000 ... examples/moe_10b_a1b.sh                     the paper's plain run, 1.05T tokens
#
# "paper" is arXiv 2605.06546; "ours": the paper does not say. It gives no shape but "Qwen3, 10B parameters, 1B active".
set -euo pipefail

NAME=moe_10b_a1b
STEPS=${STEPS:-49983}                         # paper, table 1 (its baseline: 125000)
TST_STEPS=${TST_STEPS:-12483}                 # paper, table 1: r = 0.25
BAG_SIZE=${BAG_SIZE:-16}                      # paper, table 1: s
BATCH_TOKENS=${BATCH_TOKENS:-$((1 << 23))}    # paper, set-up: 8M "equivalent tokens" a step, positions in both phases
LR=${LR:-3e-4}                                # paper, set-up: a recommended value, no sweep
SEQ=${SEQ:-4096}                              # ours: the sequence length is not given
GPU=${GPU:-h100}                              # h100 or b200; the paper's runs: 64 B200
if [[ $GPU == b200 ]]; then                   # ours; not measured
    MICRO_BATCH=${MICRO_BATCH:-2} PRECISION=${PRECISION:-mxfp8}
else
    MICRO_BATCH=${MICRO_BATCH:-1} PRECISION=${PRECISION:-bf16}
fi
# ours: experts over the 8 GPUs of a node (8 experts each), so that their all-to-all stays on NVLink and more nodes are data parallel;
# everything else is data parallel. Weights and gradients take 12 GB a GPU, the optimizer 16 GB on one node and 2 GB on eight (arithmetic).
# Experts are 1024 wide: TP would make their products smaller still. 4096 positions need no CP.
TP=${TP:-1} PP=${PP:-1} CP=${CP:-1} EP=${EP:-8}
TOKENIZER=${TOKENIZER:-meta-llama/Meta-Llama-3-8B} # ours: not given for this model; the paper's dense ones have it
SAVE_INTERVAL=${SAVE_INTERVAL:-2500}          # ours: a checkpoint with its optimizer is 146 GB

MODEL=(
    # ours, 10.4B parameters, 1.4B active (1.1B without the input embedding): 24 layers, 64 experts of which 4 are active
    --num-layers 24 --hidden-size 2048 --ffn-hidden-size 8192 --num-attention-heads 16 --kv-channels 128
    --group-query-attention --num-query-groups 4
    --num-experts 64 --moe-router-topk 4 --moe-ffn-hidden-size 1024
    --qk-layernorm --swiglu --normalization RMSNorm --norm-epsilon 1e-6 --disable-bias-linear           # paper: Qwen3
    --untie-embeddings-and-output-weights                                                               # ours
    --position-embedding-type rope --rotary-base 500000 --attention-dropout 0 --hidden-dropout 0        # ours
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-3 --moe-router-dtype fp32         # ours
    --moe-token-dispatcher-type alltoall --moe-grouped-gemm                                             # ours
    --seq-length "$SEQ" --max-position-embeddings "$SEQ"                                                # ours
    --init-method-std 0.02 --transformer-impl transformer_engine                                        # ours
)
TRAINING=(
    --train-iters "$STEPS" --global-batch-size $((BATCH_TOKENS / SEQ)) --micro-batch-size "$MICRO_BATCH"
    --lr "$LR" --lr-warmup-iters 2000                                                                   # paper, set-up
    --lr-decay-style WSD --lr-decay-iters "$STEPS" --lr-wsd-decay-iters $((STEPS / 10))                 # paper, set-up: the last 10 %
    --lr-wsd-decay-style linear --min-lr 0                                                              # ours: the shape is not given
    --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95                                                 # paper, set-up
    --weight-decay 0.1 --adam-eps 1e-8 --clip-grad 1.0 --seed 1234                                      # ours: not given
)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
