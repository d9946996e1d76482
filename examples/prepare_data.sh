#!/usr/bin/env bash
# jsonl with a field "text" a line (DCLM, FineWeb-Edu and the like) -> Megatron's indexed datasets,
# with Megatron-LM's preprocessor.
#
#     MEGATRON_LM=/path/to/Megatron-LM OUT=data examples/prepare_data.sh dclm=/corpora/dclm fineweb_edu=/corpora/fineweb_edu
#
# Each NAME=SOURCE is a corpus: a folder, searched for *.jsonl, *.jsonl.gz and *.jsonl.zst, or one
# such file. Every file becomes
# OUT/NAME/FILE_text_document.{bin,idx}; files that are there already are left alone, so a stopped
# run goes on, and several machines can share
# the work (SHARD=i/n takes each n-th file; once all are done, run it again without SHARD). The last
# line printed is DATA_PATH: the corpora
# weigh alike (the paper's 10B-A1B run: half FineWeb-Edu, half DCLM; its other runs: DCLM alone),
# the files of a corpus by their tokens.
#
# How much text: with TST s*r + (1 - r) times what the same run without it reads.
#                         without TST      with TST (s, r)
#     270m, 600m, 3b           42B         105B (6, 0.3)          270m with STEPS=100000: 210B, 524B
#     moe_10b_a1b             419B         1990B (16, 0.25)       its baseline of 125000 steps: 1049B
# and 0.2 % more, which --split keeps for validation. With less, Megatron reads text more than once.
# A token of Llama 3's is 4 bytes on disk.
#
# Variables: OUT (data), TOKENIZER (Llama 3's), WORKERS (processes, all cores), KEY (text), SHARD
# (1/1).
# Ours: a begin token before each document, as Llama 3's tokenizer puts it there, and an end token
# (--append-eod) behind it.
set -euo pipefail

OUT=${OUT:-data} TOKENIZER=${TOKENIZER:-meta-llama/Meta-Llama-3-8B} KEY=${KEY:-text} WORKERS=${WORKERS:-$(nproc)} SHARD=${SHARD:-1/1}
fail() { echo "prepare_data: $*" >&2; exit 2; }
(($# > 0)) || fail "expected NAME=SOURCE for each corpus, got nothing"
[[ -f ${MEGATRON_LM:-}/tools/preprocess_data.py ]] || fail "MEGATRON_LM: expected a checkout of Megatron-LM, got '${MEGATRON_LM:-}'"
[[ $SHARD =~ ^([0-9]+)/([0-9]+)$ ]] && ((1 <= BASH_REMATCH[1] && BASH_REMATCH[1] <= BASH_REMATCH[2])) || fail "SHARD: expected 1/4 or the like, got '$SHARD'"
MINE=$((BASH_REMATCH[1] - 1)) SHARDS=${BASH_REMATCH[2]}

# Megatron's preprocessor reads one plain .jsonl (a .gz with --partitions alone, .zst never), so
# each file is unpacked beside the output first.
unpack() {
    case $1 in
        *.gz) gzip -dc "$1" ;;
        *.zst) zstd -dcq "$1" ;;
        *) cat "$1" ;;
    esac
}

prepare() { # file, folder, stem -> folder/stem_KEY_document; under folder/part until it is whole, the index moved last
    local file=$1 folder=$2 done=$3_${KEY}_document part=$2/part/$3
    [[ ! -f $folder/$done.idx ]] || return 0
    mkdir -p "$folder/part"
    unpack "$file" >"$part.jsonl"
    python "$MEGATRON_LM/tools/preprocess_data.py" --input "$part.jsonl" --json-keys "$KEY" --append-eod --workers "$WORKERS" \
        --log-interval 100000 --output-prefix "$part" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER" \
        >"$part.log" 2>&1 &
    # One of its processes that dies (a line that is no JSON, say) is waited for without end: look
    # for its traceback.
    while kill -0 $! 2>/dev/null; do
        ! grep -q '^Process .*:$' "$part.log" || kill $! || true
        sleep 1
    done
    wait $! || { tail -n 5 "$part.log" >&2; fail "$file: the preprocessor failed, see $part.log"; }
    mv "$folder/part/$done.bin" "$folder/$done.bin"
    mv "$folder/part/$done.idx" "$folder/$done.idx"
    rm "$part.jsonl" "$part.log"
    echo "$folder/$done"
}

# The preprocessor would end each document with this token, and hang without one.
python -c 'import sys; from transformers import AutoTokenizer; sys.exit(AutoTokenizer.from_pretrained(sys.argv[1]).eos_token_id is None)' "$TOKENIZER" ||
    fail "TOKENIZER: expected a Hugging Face tokenizer with an end token, got '$TOKENIZER'"

number=0
for corpus in "$@"; do
    name=${corpus%%=*} source=${corpus#*=}
    [[ $corpus == ?*=?* && -e $source ]] || fail "expected NAME=SOURCE with a folder or file that is there, got '$corpus'"
    found=0
    while IFS= read -r -d '' file; do
        found=1
        relative=${file#"$source"} relative=${relative#/} relative=${relative:-$(basename "$file")}
        stem=${relative%.zst} stem=${stem%.gz} stem=${stem%.jsonl} stem=${stem//\//_}
        ((number++ % SHARDS == MINE)) || continue
        prepare "$file" "$OUT/$name" "$stem"
    done < <(find -L "$source" -type f \( -name '*.jsonl' -o -name '*.jsonl.gz' -o -name '*.jsonl.zst' \) -print0 | sort -z)
    ((found)) || fail "$source: expected *.jsonl, *.jsonl.gz or *.jsonl.zst, got none"
done

# A prefix's weight: its corpus's share, cut by the sizes of the files. The index's 18th byte is the
# type of the tokens: 8 is two bytes, else four.
blend='' tokens=0
for corpus in "$@"; do
    folder=$OUT/${corpus%%=*} size=0
    for idx in "$folder"/*_"${KEY}"_document.idx; do
        [[ -f $idx ]] || fail "$folder: expected the corpus's indexed datasets, got none; other machines still have them to do"
        bytes=$(stat -c %s "${idx%.idx}.bin")
        size=$((size + bytes)) tokens=$((tokens + bytes / ($(od -An -tu1 -j17 -N1 "$idx") == 8 ? 2 : 4)))
    done
    for idx in "$folder"/*_"${KEY}"_document.idx; do
        blend+=$(awk -v part="$(stat -c %s "${idx%.idx}.bin")" -v all="$size" -v corpora=$# 'BEGIN { printf "%.8f ", part / all / corpora }')
        blend+="${idx%.idx} "
    done
done
echo "$tokens tokens in $OUT"
echo "DATA_PATH=\"${blend% }\""
