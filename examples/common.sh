# What every recipe does after its configuration: the flags that follow from its variables, then the start of training. Sourced, not run.
#
# Expects NAME, STEPS, TST_STEPS, BAG_SIZE, SEQ, BATCH_TOKENS, MICRO_BATCH, TP, PP, CP, EP, GPU, PRECISION and the arrays MODEL and TRAINING.
# Everything below is ours: the paper says nothing about it (its runs were TorchTitan's FSDP in an unnamed precision).
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NNODES=${NNODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-8} NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost} MASTER_PORT=${MASTER_PORT:-29500}
SAVE=${SAVE:-checkpoints/$NAME$([[ -z ${BASELINE:-} ]] || echo -baseline)} # also where a run that was stopped goes on from
TOKENIZER=${TOKENIZER:-meta-llama/Meta-Llama-3-8B}
fail() { echo "$NAME: $*" >&2; exit 2; }
((BATCH_TOKENS % SEQ == 0)) || fail "BATCH_TOKENS: expected a multiple of SEQ=$SEQ, got $BATCH_TOKENS"

# TST. BASELINE=1 is the same run without it.
TST=(--tst-bag-size "$BAG_SIZE" --tst-iters "$TST_STEPS")
[[ -z ${BASELINE:-} ]] || TST=()

# Data: DATA_PATH is the line that prepare_data.sh prints. MOCK_DATA=1: made-up tokens and no tokenizer, to try the machines.
# 0.2 % of the text is kept for validation, which is next-token loss in both phases: 4 batches every 1000 steps.
DATA=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER" --split 998,2,0 --data-cache-path "${DATA_CACHE:-$SAVE/index}"
    --no-create-attention-mask-in-dataloader --eval-interval 1000 --eval-iters 4)
if [[ -n ${MOCK_DATA:-} ]]; then
    DATA=(--mock-data --tokenizer-type NullTokenizer --vocab-size 128256 "${DATA[@]:4}")
elif [[ -n ${DATA_PATH:-} ]]; then
    read -ra BLEND <<<"$DATA_PATH"
    DATA+=(--data-path "${BLEND[@]}")
else
    [[ -n ${DRY_RUN:-} ]] || fail "DATA_PATH: expected what prepare_data.sh printed, or MOCK_DATA=1, got nothing"
    DATA+=(--data-path data/text_document)
fi

# Parallelism. The optimizer's state is spread over the data-parallel ranks and its communication overlapped. The vocabulary has 128256 =
# 2^8 * 501 rows; padded to a multiple of 128 whatever TP is, the model is the same in every layout.
PARALLEL=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP"
    --expert-model-parallel-size "$EP" --make-vocab-size-divisible-by $((128 / TP))
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
((TP == 1)) || PARALLEL+=(--sequence-parallel)
((EP == 1)) || PARALLEL+=(--expert-tensor-parallel-size 1)
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron demands it for TP and CP before Blackwell

# Precision. Embedding, norms, router, output layer and loss stay bf16/fp32 in all of them. Delayed scaling, Megatron's default recipe, is not
# offered: it carries state over the phase boundary, and Transformer Engine 2.20 refuses to load that from a checkpoint.
PRECISION_FLAGS=(--bf16)
case $PRECISION in
    bf16) ;;
    fp8) PRECISION_FLAGS+=(--fp8-format hybrid --fp8-recipe tensorwise) ;;  # H100, H200, B200
    fp8-blockwise) PRECISION_FLAGS+=(--fp8-format e4m3 --fp8-recipe blockwise) ;;  # H100, H200; every width a multiple of 128
    mxfp8) # B200; the weights live in FP8 and are gathered in it, through the gradient buffer
        [[ $GPU == b200 ]] || fail "PRECISION=mxfp8: expected GPU=b200, got GPU=$GPU. Hopper has no MXFP8: use PRECISION=fp8."
        PRECISION_FLAGS+=(--fp8-format e4m3 --fp8-recipe mxfp8 --fp8-param-gather --reuse-grad-buf-for-mxfp8-param-ag) ;;
    *) fail "PRECISION: expected bf16, fp8, fp8-blockwise or mxfp8, got $PRECISION" ;;
esac

# Checkpoints and logs. --load is --save, so that the same command starts and goes on. SIGTERM to the processes saves and exits; sent to torchrun,
# it leaves them 30 seconds for that.
RUN=(--save "$SAVE" --load "$SAVE" --save-interval "${SAVE_INTERVAL:-1000}" --ckpt-format torch_dist --exit-signal-handler
    --log-interval 10 --log-throughput --tensorboard-dir "$SAVE/tensorboard" --distributed-timeout-minutes 60)

# Megatron-LM's own script where MEGATRON_LM names a checkout, else ours, which needs the megatron-core wheel alone.
PROGRAM=("$HERE/pretrain_gpt_tst.py")
[[ -z ${MEGATRON_LM:-} ]] || PROGRAM=(-m megatron_tst.launch "$MEGATRON_LM/pretrain_gpt.py")
LAUNCHER=(torchrun --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
[[ -z ${RANK:-} ]] || LAUNCHER=(python) # something else, as srun, has started a process for each GPU
FLAGS=("${MODEL[@]}" "${TRAINING[@]}" "${TST[@]}" "${DATA[@]}" "${PARALLEL[@]}" "${PRECISION_FLAGS[@]}" "${RUN[@]}" "$@")

line() { (($# == 0)) || { printf ' \\\n   '; printf ' %q' "$@"; }; }
if [[ -n ${DRY_RUN:-} ]]; then # print the command, a group of flags a line; then, but for DRY_RUN=print, validate it
    printf '%q' "${LAUNCHER[0]}"; printf ' %q' "${LAUNCHER[@]:1}" "${PROGRAM[@]}"
    line "${MODEL[@]}"; line "${TRAINING[@]}"; line "${TST[@]}"; line "${DATA[@]}"; line "${PARALLEL[@]}"; line "${PRECISION_FLAGS[@]}"
    line "${RUN[@]}"; line "$@"; echo
    [[ $DRY_RUN == print ]] ||
        python "$HERE/dry_run.py" --world-size $((NNODES * GPUS_PER_NODE)) --gpu "$GPU" ${MEGATRON_LM:+--megatron-lm "$MEGATRON_LM"} -- "${FLAGS[@]}"
else
    exec "${LAUNCHER[@]}" "${PROGRAM[@]}" "${FLAGS[@]}"
fi
