# What every launch script does: the recipe's flags, those of data, checkpoints and logs, then the
# start of training. Sourced by the scripts, which set NAME; not run.
#
# Everything below is ours: the paper says nothing about it (its runs were TorchTitan's FSDP in an
# unnamed precision).
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NNODES=${NNODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-8} NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost} MASTER_PORT=${MASTER_PORT:-29500} GPU=${GPU:-h100}
# SAVE is also where a run that was stopped goes on from
SAVE=${SAVE:-checkpoints/${NAME//-/_}$([[ -z ${BASELINE:-} ]] || echo -baseline)}
TOKENIZER=${TOKENIZER:-meta-llama/Meta-Llama-3-8B}
fail() { echo "$NAME: $*" >&2; exit 2; }
for variable in NNODES GPUS_PER_NODE; do
    [[ ${!variable} =~ ^[1-9][0-9]*$ ]] ||
        fail "$variable: expected a whole number above 0, got '${!variable}'"
done

# The recipe, with the variables that are set: MODEL_FLAGS, TRAINING_FLAGS, TST_FLAGS,
# PARALLEL_FLAGS, PRECISION_FLAGS and VOCABULARY.
given=()
for variable in GPU STEPS TST_STEPS BAG_SIZE BATCH_TOKENS LR SEQ MICRO_BATCH PRECISION \
    TP PP CP EP LAYOUT; do
    [[ -z ${!variable:-} ]] || given+=("$variable=${!variable}")
done
recipe=$(PYTHONPATH=$HERE/..${PYTHONPATH:+:$PYTHONPATH} \
    python -m megatron_tst plan --preset "$NAME" --print "${given[@]}") || exit
eval "$recipe"
[[ -z ${BASELINE:-} ]] || TST_FLAGS=() # the same run without TST

# Data: DATA_PATH is the line that prepare_data.sh prints. MOCK_DATA=1: made-up tokens and no
# tokenizer, to try the machines. 0.2 % of the text is kept for validation, which is next-token loss
# in both phases: 4 batches every 1000 steps.
DATA=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER" --split 998,2,0
    --data-cache-path "${DATA_CACHE:-$SAVE/index}" --no-create-attention-mask-in-dataloader
    --eval-interval 1000 --eval-iters 4)
if [[ -n ${MOCK_DATA:-} ]]; then
    DATA=(--mock-data --tokenizer-type NullTokenizer --vocab-size "$VOCABULARY" "${DATA[@]:4}")
elif [[ -n ${DATA_PATH:-} ]]; then
    read -ra BLEND <<<"$DATA_PATH"
    DATA+=(--data-path "${BLEND[@]}")
else
    [[ -n ${DRY_RUN:-} ]] ||
        fail "DATA_PATH: expected what prepare_data.sh printed, or MOCK_DATA=1, got nothing"
    DATA+=(--data-path data/text_document)
fi

# Megatron demands it for TP and CP before Blackwell
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# Checkpoints and logs. --load is --save, so that the same command starts and goes on. SIGTERM to
# the processes saves and exits; sent to torchrun, it leaves them 30 seconds for that.
RUN=(--save "$SAVE" --load "$SAVE" --save-interval "${SAVE_INTERVAL:-1000}"
    --ckpt-format torch_dist --exit-signal-handler --log-interval 10 --log-throughput
    --tensorboard-dir "$SAVE/tensorboard" --distributed-timeout-minutes 60)

# Megatron-LM's own script where MEGATRON_LM names a checkout, else ours, which needs the
# megatron-core wheel alone.
PROGRAM=("$HERE/pretrain_gpt_tst.py")
[[ -z ${MEGATRON_LM:-} ]] || PROGRAM=(-m megatron_tst.launch "$MEGATRON_LM/pretrain_gpt.py")
LAUNCHER=(torchrun --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
# where something else, as srun, has started a process for each GPU
[[ -z ${RANK:-} ]] || LAUNCHER=(python)
FLAGS=("${MODEL_FLAGS[@]}" "${TRAINING_FLAGS[@]}" "${TST_FLAGS[@]}" "${DATA[@]}"
    "${PARALLEL_FLAGS[@]}" "${PRECISION_FLAGS[@]}" "${RUN[@]}" "$@")

line() { (($# == 0)) || { printf ' \\\n   '; printf ' %q' "$@"; }; }
if [[ -n ${DRY_RUN:-} ]]; then
    # print the command, a group of flags a line; then, but for DRY_RUN=print, validate it
    printf '%q' "${LAUNCHER[0]}"
    printf ' %q' "${LAUNCHER[@]:1}" "${PROGRAM[@]}"
    line "${MODEL_FLAGS[@]}"
    line "${TRAINING_FLAGS[@]}"
    line "${TST_FLAGS[@]}"
    line "${DATA[@]}"
    line "${PARALLEL_FLAGS[@]}"
    line "${PRECISION_FLAGS[@]}"
    line "${RUN[@]}"
    line "$@"
    echo
    [[ $DRY_RUN == print ]] ||
        PYTHONPATH=${MEGATRON_LM:+$MEGATRON_LM${PYTHONPATH:+:}}${PYTHONPATH:-} \
            python "$HERE/dry_run.py" \
            --world-size $((NNODES * GPUS_PER_NODE)) --gpu "$GPU" --vocabulary "$VOCABULARY" \
            -- "${FLAGS[@]}"
else
    exec "${LAUNCHER[@]}" "${PROGRAM[@]}" "${FLAGS[@]}"
fi
