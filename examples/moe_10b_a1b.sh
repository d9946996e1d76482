#!/usr/bin/env bash
# 10B-A1B mixture of experts, the paper's largest. 49,983 steps of 8M positions, 12,483 of them with
# bags of 16: 2T tokens.
#
#     DRY_RUN=1 examples/moe_10b_a1b.sh              print and validate the command, on any machine
#     NNODES=8 GPU=b200 DATA_PATH="0.5 data/a 0.5 data/b" examples/moe_10b_a1b.sh   as the paper's
#     BASELINE=1 STEPS=125000 ... examples/moe_10b_a1b.sh        its plain run, 1.05T tokens
#
# Shape, training, TST, layout and precision, each number with where it is from:
# megatron_tst/planning/recipes.py. Variables of the environment change them: README.md.
set -euo pipefail

NAME=moe-10b-a1b
SAVE_INTERVAL=${SAVE_INTERVAL:-2500} # ours: a checkpoint with its optimizer is 146 GB
# ours: not given for this model; the paper's dense ones have it
TOKENIZER=${TOKENIZER:-meta-llama/Meta-Llama-3-8B}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
