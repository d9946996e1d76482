#!/usr/bin/env bash
# A user's whole way in a new folder, with nothing but the installed package: text of one's own,
# plan, superposition, exit, inspect, convert, recovery on stock Megatron, export, generate, plot.
#
#     bash tools/story.sh FOLDER       FOLDER is made; it takes about two minutes on two CPU cores
#
# Needs megatron-tst[demo,hf] and transformers. `make test-wheel` runs it with the wheel alone.
set -euo pipefail
mkdir "$1"
cd "$1"
export MEGATRON_TST_CPU=1 CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=0

step() { echo "story: $*"; }
fail() { echo "story: FAILED: $*" >&2; exit 1; }
says() { grep -q -- "$2" "$1" || { tail -20 "$1" >&2; fail "$1: expected the line '$2'"; }; }
# the flags that Megatron needs on CPU
read -ra CPU < <(python -c 'from megatron_tst import cpu; print(cpu.FLAGS)')
train() { python -m megatron_tst.pretrain_gpt "${CPU[@]}" "$@"; }

step "text: each first line of a docstring of Python's standard library is a document"
mkdir text
LIBRARY=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
find "$LIBRARY" -name '*.py' -not -path '*site-packages*' -exec cat {} + |
    sed -n 's/^ *"""\([A-Z][^"]*\)"\{0,3\}$/\1/p' | sort -u |
    (cd text && split -l 1 -a 4 --additional-suffix .txt -)
megatron-tst corpus --input text --output corpus/lines --vocab-size 512

STEPS=240 BAG_SIZE=2 SUPERPOSED=80
MODEL=(--num-layers 2 --hidden-size 64 --ffn-hidden-size 176 --num-attention-heads 4
    --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0)
TRAINING=(--micro-batch-size 16 --global-batch-size 16 --train-iters $STEPS --lr 1e-2 --min-lr 0
    --lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters 60 --lr-warmup-iters 20
    --weight-decay 0.01 --clip-grad 1.0 --log-interval 10 --eval-interval 120 --eval-iters 4)
DATA=(--data-path corpus/lines --split 95,5,0 --tokenizer-type NullTokenizer --vocab-size 512)
SAVE=(--save-interval 1000 --ckpt-format torch_dist)
TST=(--tst-bag-size $BAG_SIZE --tst-iters $SUPERPOSED)

step "plan: does the text suffice?"
megatron-tst plan "${MODEL[@]}" "${TRAINING[@]}" "${DATA[@]}" "${TST[@]}" --gpus 1 >plan.txt ||
    fail "$(cat plan.txt)"

step "baseline, and superposition up to the boundary"
train "${MODEL[@]}" "${TRAINING[@]}" "${DATA[@]}" "${SAVE[@]}" --save ck_base >baseline.log 2>&1 ||
    fail "$(tail -5 baseline.log)"
train "${MODEL[@]}" "${TRAINING[@]}" "${DATA[@]}" "${SAVE[@]}" --save ck "${TST[@]}" \
    --tst-exit-at-boundary --tst-stock-index index >superposition.log 2>&1 ||
    fail "$(tail -5 superposition.log)"
says superposition.log "\[tst\] on: bag size $BAG_SIZE"

step "inspect, convert"
megatron-tst inspect ck >inspect.txt
says inspect.txt "iteration  *$SUPERPOSED"
says inspect.txt "superposition"
megatron-tst boundary ck ck_stock
megatron-tst verify ck ck_stock

step "recovery without TST, on the text that TST would have read"
train "${MODEL[@]}" "${TRAINING[@]}" "${DATA[@]}" "${SAVE[@]}" --load ck_stock --save ck_stock \
    --data-cache-path index >recovery.log 2>&1 || fail "$(tail -5 recovery.log)"
says recovery.log " iteration  *$STEPS/"
! grep -q "\[tst\]" recovery.log || fail "recovery.log: expected stock Megatron, got TST's lines"

step "export, and text until the end token"
megatron-tst export-hf ck_stock hf --tokenizer corpus/lines.tokenizer.json
python - <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (x.from_pretrained("hf") for x in (AutoModelForCausalLM, AutoTokenizer))
assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 511, tokenizer
torch.manual_seed(0)
begin = tokenizer("Return the", return_tensors="pt").input_ids.repeat(8, 1)
made = model.generate(begin, do_sample=True, top_k=5, max_new_tokens=60, pad_token_id=511)
texts = tokenizer.batch_decode(made, skip_special_tokens=True)
ended = (made[:, begin.shape[1] :] == tokenizer.eos_token_id).any(1)
print("\n".join(f"story:   {text!r}{'' if end else ' ...'}" for text, end in zip(texts, ended)))
assert ended.sum() >= 6, f"expected that most texts end by themselves, got {ended.sum()} of 8"
PYTHON

step "plot: the two phases are one run"
cat superposition.log recovery.log >tst.log
megatron-tst plot --output loss.png baseline=baseline.log TST=tst.log
[[ -s loss.png ]] || fail "loss.png: expected a picture"
step "all is well"
