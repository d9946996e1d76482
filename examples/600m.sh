#!/usr/bin/env bash
# 600M dense: SmolLM2-360M's shape as a Llama 3. 20,000 steps of 2M positions: 42B tokens, 105B with
# TST.
#
#     DRY_RUN=1 examples/600m.sh                     print and validate the command, on any machine
#     DATA_PATH="1 data/dclm_text_document" examples/600m.sh     one node of 8 H100; more: README.md
#
# Shape, training, TST, layout and precision, each number with where it is from:
# megatron_tst/planning/recipes.py. Variables of the environment change them: README.md.
set -euo pipefail

NAME=600m
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
