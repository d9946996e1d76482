#!/usr/bin/env bash
# 16B-A3B mixture of experts, Moonlight's shape: multi-latent attention, 64 experts and 2 shared,
# a dense first layer. 272,000 steps of 8M positions, 81,600 of them with bags of 6: 5.7T tokens,
# as many as the released model read. Not a run of the paper, and not trained by us.
#
#     DRY_RUN=1 examples/moe_16b_a3b.sh              print and validate the command, on any machine
#     NNODES=2 DATA_PATH="1 data/a" examples/moe_16b_a3b.sh             on each of two nodes of H100
#     GPU=b200 DATA_PATH="1 data/a" examples/moe_16b_a3b.sh
#
# megatron-core 0.19 and later put one more norm before this shape's queries, which no released model
# has (Megatron-Bridge#5261). For a model that export-hf writes append `--q-lora-rank 1536`, or use
# megatron-core 0.18.
#
# Shape, training, TST, layout and precision, each number with where it is from:
# megatron_tst/planning/recipes.py. Variables of the environment change them: README.md.
set -euo pipefail

NAME=moe-16b-a3b
SAVE_INTERVAL=${SAVE_INTERVAL:-2500} # ours: a checkpoint with its optimizer is 223 GB
TOKENIZER=${TOKENIZER:-moonshotai/Moonlight-16B-A3B} # ours: any of 163,840 ids or fewer
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
