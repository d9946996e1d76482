#!/usr/bin/env bash
# 671B-A37B mixture of experts, DeepSeek-V3's shape: multi-latent attention, 256 experts of which 8
# in 4 of 8 groups, one shared, three dense first layers, multi-token prediction. 88,200 steps of
# 67M positions, 26,460 of them with bags of 6: 14.8T tokens, as many as the released model read.
# Not a run of the paper, and not trained by us.
#
#     DRY_RUN=1 examples/moe_671b_a37b.sh            print and validate the command, on any machine
#     DRY_RUN=1 GPU=b200 examples/moe_671b_a37b.sh
#     NODE_RANK=... MASTER_ADDR=... DATA_PATH="1 data/a" examples/moe_671b_a37b.sh   on each of 128
#
# The layouts are those of Megatron-Bridge 0.6 for 1024 H100 and for 256 B200. Shape, training, TST,
# layout and precision, each number with where it is from: megatron_tst/planning/recipes.py.
# Variables of the environment change them: README.md.
set -euo pipefail

NAME=moe-671b-a37b
if [[ ${GPU:-h100} == b200 ]]; then NNODES=${NNODES:-32}; else NNODES=${NNODES:-128}; fi
SAVE_INTERVAL=${SAVE_INTERVAL:-500} # ours: a checkpoint with its optimizer is 9.6 TB
TOKENIZER=${TOKENIZER:-deepseek-ai/DeepSeek-V3} # ours: any of 129,280 ids or fewer
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
