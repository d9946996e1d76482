#!/usr/bin/env bash
# 270M dense, the paper's smallest: SmolLM2-135M's shape as a Llama 3. 20,000 steps of 2M positions: 42B tokens, 105B with TST.
#
#     DRY_RUN=1 examples/270m.sh                                              print and validate the command, on any machine
#     DATA_PATH="1 data/dclm_text_document" examples/270m.sh                  one node of 8 H100; more nodes, other GPUs: README.md
#     STEPS=100000 DATA_PATH=... examples/270m.sh                             the paper's longer run, 524B tokens
#
# "paper" is arXiv 2605.06546; "filled in" follows from the model that the paper names; "ours": the paper does not say.
set -euo pipefail

NAME=270m
STEPS=${STEPS:-20000}                         # paper, table 1 (also 100000)
TST_STEPS=${TST_STEPS:-$((STEPS * 3 / 10))}   # paper, table 1: r = 0.3
BAG_SIZE=${BAG_SIZE:-6}                       # paper, table 1: s
BATCH_TOKENS=${BATCH_TOKENS:-$((1 << 21))}    # paper, set-up: 2M "equivalent tokens" a step, positions in both phases
LR=${LR:-2e-3}                                # paper, set-up: swept on the baseline
SEQ=${SEQ:-4096}                              # ours: the sequence length is not given
GPU=${GPU:-h100}                              # h100 or b200
if [[ $GPU == b200 ]]; then                   # ours; not measured
    MICRO_BATCH=${MICRO_BATCH:-8} PRECISION=${PRECISION:-mxfp8}
else
    MICRO_BATCH=${MICRO_BATCH:-4} PRECISION=${PRECISION:-bf16}
fi
# ours: data parallelism alone. Weights and gradients take 2 GB a GPU; what is large is the logits, 1 GB in bf16 and 2 GB in fp32 a sample,
# of which MICRO_BATCH decides. 9 heads cannot be cut by a TP of 2, 4 or 8, and 4096 positions need no CP.
TP=${TP:-1} PP=${PP:-1} CP=${CP:-1} EP=1

MODEL=(
    --num-layers 30 --hidden-size 576 --ffn-hidden-size 1536 --num-attention-heads 9 --kv-channels 64   # filled in: SmolLM2-135M
    # plain multi-head attention: with it the model has the 267M parameters of its name, with SmolLM2's 3 groups 254M
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
