#!/usr/bin/env bash
# 3B dense: SmolLM3-3B's shape as a Llama 3. 20,000 steps of 2M positions: 42B tokens, 105B with
# TST.
#
#     DRY_RUN=1 examples/3b.sh                       print and validate the command, on any machine
#     DATA_PATH="1 data/dclm_text_document" examples/3b.sh       one node of 8 H100; more: README.md
#     BASELINE=1 STEPS=36000 DATA_PATH=... examples/3b.sh        the paper's plain run with the loss
#                                                                of this one (also 50000)
#
# Shape, training, TST, layout and precision, each number with where it is from:
# megatron_tst/planning/recipes.py. Variables of the environment change them: README.md.
set -euo pipefail

NAME=3b
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
