#!/usr/bin/env bash
# 270M dense, the paper's smallest: SmolLM2-135M's shape as a Llama 3. 20,000 steps of 2M positions:
# 42B tokens, 105B with TST.
#
#     DRY_RUN=1 examples/270m.sh                     print and validate the command, on any machine
#     DATA_PATH="1 data/dclm_text_document" examples/270m.sh     one node of 8 H100; more: README.md
#     STEPS=100000 DATA_PATH=... examples/270m.sh    the paper's longer run, 524B tokens
#
# Shape, training, TST, layout and precision, each number with where it is from:
# megatron_tst/planning/recipes.py. Variables of the environment change them: README.md.
set -euo pipefail

NAME=270m
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
