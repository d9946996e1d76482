#!/usr/bin/env bash
# 3B dense: SmolLM3-3B's shape as a Llama 3. 20,000 steps of 2M positions: 42B tokens, 105B with TST.
#
#     DRY_RUN=1 examples/3b.sh                                                print and validate the command, on any machine
#     DATA_PATH="1 data/dclm_text_document" examples/3b.sh                    one node of 8 H100; more nodes, other GPUs: README.md
#     BASELINE=1 STEPS=36000 DATA_PATH=... examples/3b.sh                     the paper's plain run with the loss of this one (also 50000)
#
# "paper" is arXiv 2605.06546; "filled in" follows from the model that the paper names; "ours": the paper does not say.
set -euo pipefail

NAME=3b
STEPS=${STEPS:-20000}                         # paper, table 1 (its baselines: also 36000 and 50000)
TST_STEPS=${TST_STEPS:-$((STEPS * 3 / 10))}   # paper, table 1: r = 0.3
BAG_SIZE=${BAG_SIZE:-6}                       # paper, table 1: s
BATCH_TOKENS=${BATCH_TOKENS:-$((1 << 21))}    # paper, set-up: 2M "equivalent tokens" a step, positions in both phases
LR=${LR:-2e-4}                                # paper, set-up: a recommended value, no sweep
SEQ=${SEQ:-4096}                              # ours: the sequence length is not given
GPU=${GPU:-h100}                              # h100 or b200
if [[ $GPU == b200 ]]; then                   # ours; not measured
    MICRO_BATCH=${MICRO_BATCH:-4} PRECISION=${PRECISION:-mxfp8}
else
    MICRO_BATCH=${MICRO_BATCH:-1} PRECISION=${PRECISION:-bf16}
fi
# ours: data parallelism alone. Weights and gradients take 20 GB a GPU, the optimizer 5 GB at 8 GPUs, activations about 20 GB a sample and the
# logits 5 GB (arithmetic): that fits 80 GB without cutting the model. For a longer SEQ: CP=2, or TP=2 (16 heads in 4 groups: 2 or 4).
TP=${TP:-1} PP=${PP:-1} CP=${CP:-1} EP=1

MODEL=(
    --num-layers 36 --hidden-size 2048 --ffn-hidden-size 11008 --num-attention-heads 16 --kv-channels 128  # filled in: SmolLM3-3B
    --group-query-attention --num-query-groups 4                                                        # filled in: SmolLM3-3B
    --untie-embeddings-and-output-weights                                                               # paper, set-up
    --swiglu --normalization RMSNorm --norm-epsilon 1e-5 --disable-bias-linear                          # filled in: Llama 3
    --position-embedding-type rope --rotary-base 500000 --attention-dropout 0 --hidden-dropout 0        # filled in: Llama 3
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
