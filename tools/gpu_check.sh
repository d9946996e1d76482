#!/usr/bin/env bash
# Builds, tests and measures on a machine with one NVIDIA GPU, without network, in parts of at most
# four minutes. Everything it finds goes to OUT, as at most eight files; OUT/report.md sums up.
#
#     tools/gpu_check.sh [--part PART[-STEP]]... [--wheels DIR] [--extension FILE] [OUT]
#
#     --part first       from a bare machine to the figures that matter most
#     --part PART-STEP   one step of a part, as sanitize-initcheck; without --part: all but first
#     --wheels DIR       wheels that the machine may lack: megatron-core, psutil, and for FP8 those
#                        of Transformer Engine; they go to build/gpu_check_site
#     --extension FILE   a megatron_tst/_C*.so built elsewhere for the same Python and torch:
#                        TORCH_CUDA_ARCH_LIST=9.0 python setup.py build_ext --inplace
#                        Without one, or where it does not fit, the extension is compiled
#     --slow FACTOR      every part and step may take so many times as long
#     --rehearse         on a CPU with small shapes, to see that it all runs; measures no GPU
#     OUT                default $OUT; keeps what other parts left there. After a check that was
#                        ended from outside, `python tools/gpu_report.py OUT` sums up again
#
# Needs Python 3.12 with torch for CUDA, nvcc of the same major version, megatron-core and pytest.
# PYTHON=python3.12 chooses the interpreter. Exit code: the number of failed steps; 2 with a message
# where nothing could be started.
set -uo pipefail
SECONDS=0
# part, its seconds, what it answers
budgets="\
first 240 are the kernels right, how fast are loss and embedding, a superposed step
build 200 the extension for this GPU; no kernel may spill registers
test 240 tests/gpu; two tensor-parallel ranks that train on the GPU over gloo
sanitize 240 every kernel under memcheck, racecheck, synccheck and initcheck
bench 240 the benchmarks, with all peers that are installed
hints 240 the loss without its cache hints: two more builds
fp8 240 FP8 in every recipe that the GPU runs against bf16, in both phases; steps in FP8
train 240 superposed steps at 270M, 1.4B active and 600M; the demo
graphs 120 full-iteration CUDA graphs over the phase boundary"
graphs=tests/gpu/test_full_iteration_graph.py
known='^(first|build|test|sanitize|bench|hints|fp8|train|graphs)$'
names=$(awk '{print $1}' <<< "$budgets" | tr '\n' ' ')

usage() { echo "gpu_check: error: $1" >&2; sed -n '5p' "$0" | cut -c3- >&2; exit 2; }

help() {
    sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-
    printf '\nParts, and the seconds that each may take:\n\n'
    awk '{s += $2; n = $1; b = $2; $1 = $2 = ""; printf "    %-9s %4d %s\n", n, b, $0}
        END {printf "    %-9s %4d\n", "together", s}' <<< "$budgets"
    printf '\nSteps:\n\n'
    local name
    for name in $names; do printf '    %-9s %s\n' "$name" "$(steps_of "$name")"; done
}

parts=() wheels="" extension="" rehearse="" factor=1 out=${OUT:-} asked="" listing="" only=""
python=${PYTHON:-python3} capability="" work="" failed=0 said=""
want() { usage "$1: expected $2, got $3"; }
named=""
while (($#)); do
    case $1 in
        --part) parts+=("${2:-}"); shift 2 || want --part "a part" nothing ;;
        --wheels) wheels=${2:-}; shift 2 || want --wheels "a folder" nothing
            [[ -d $wheels ]] || want --wheels "a folder" "$wheels" ;;
        --extension) extension=${2:-}; shift 2 || want --extension "a file" nothing
            [[ -f $extension ]] || want --extension "a file" "$extension" ;;
        --slow) factor=${2:-}; shift 2 || want --slow "a whole number" nothing
            [[ $factor =~ ^[1-9][0-9]?$ ]] || want --slow "a whole number of 1 to 99" "$factor" ;;
        --rehearse) rehearse=1; shift ;;
        --help | -h) asked=1; shift ;;
        -*) usage "expected an option that --help names, got $1" ;;
        *) [[ -z $named ]] || usage "expected one folder for the results, got $named and $1"
            out=$1 named=$1; shift ;;
    esac
done

# --- steps

# NAME LIMIT COMMAND...: run it for LIMIT seconds at most and not beyond the part's time, keep its
# output and how it ended, write the report. Returns the command's exit code; 124: out of time
step() {
    local name=$1 limit=$2 start=$SECONDS code=0; shift 2
    [[ -z $listing ]] || { echo "$name"; return; }
    [[ -z $only || $only == "$name" ]] || return 0
    limit=$((limit * factor))
    ((limit <= deadline - SECONDS)) || limit=$((deadline - SECONDS))
    local log=$out/$part-$name.log
    echo "== $part-$name, at most $limit s"
    if ((limit < 1)); then
        echo "no time was left" > "$log"; code=124 limit=0
    else
        timeout -k 5 "$limit" "$@" > "$log" 2>&1 < /dev/null || code=$?
        # it did not end when it was told to; sooner, something else has killed it
        ((code != 137 || SECONDS - start < limit)) || code=124
    fi
    if ((code == 0)); then echo "   ok, $((SECONDS - start)) s"; else
        echo "   FAILED ($code) after $((SECONDS - start)) s:"; tail -n 5 "$log"
        failed=$((failed + 1))
    fi
    printf '{"part": "%s", "step": "%s", "code": %d, "seconds": %d, "limit": %d%s}\n' "$part" \
        "$name" $code $((SECONDS - start)) $limit "${rehearse:+, \"rehearsed\": true}" \
        >> "$out/steps.jsonl"
    cp "$log" "$work/last.log"
    pack "$log"
    for log in resources.json linear_loss.csv fp8.json; do pack "$out/$log"; done
    pack "$work/fp8/fp8.json"
    $python tools/gpu_report.py "$out" || echo "   no report: see above"
    return $code
}

# FILE: into OUT/details.tar and away, so that OUT stays a handful of files
pack() {
    [[ -f $1 ]] || return 0
    mkdir -p "$work/packed"
    tail -c 2000000 "$1" > "$work/packed/$(basename "$1")" # the end says what happened
    tar -C "$work/packed" -rf "$out/details.tar" "$(basename "$1")" && rm -f "$1"
}

steps_of() { (listing=1 only="" part=$1; "part_$1") | xargs; }
# GPU REHEARSAL: the value of the case
either() { if [[ -z $rehearse ]]; then echo "$1"; else echo "$2"; fi; }

# --- parts

# An extension that fits: the one given, the one that is there, or a new one
ready() {
    local only=""
    step extension 40 $python tools/gpu_machine.py extension ${extension:+"$extension"}
    [[ -z $rehearse ]] || return 0 # the one that is there has to do
    if [[ -n $listing ]] || ! grep -q "^fits" "$work/last.log"; then compile; fi
}

# In place for this GPU; where there is none for sm_90 and sm_100, beside
compile() {
    local where=(--inplace) list=$capability names=sm_${capability/./}
    if [[ -z $capability ]]; then
        where=(--build-lib "$work/lib" --build-temp "$work/temp")
        list="9.0 10.0" names="sm_90 sm_100"
    fi
    step compile 180 env TORCH_CUDA_ARCH_LIST="$list" $python setup.py build_ext --force \
        "${where[@]}"
    [[ -n $listing || ! -f $work/last.log ]] || cp "$work/last.log" "$work/compile.log"
    step resources 20 $python tools/gpu_machine.py resources "$work/compile.log" \
        "$out/resources.json" $names
}

loss() { # NAME LIMIT FLAGS...
    step "$1" "$2" $python benchmarks/bench_multi_hot_ce.py --csv "$out/multi_hot_ce.csv" --apart \
        "${@:3}"
}

# NAME LIMIT MODEL SAMPLES FLAGS...: superposed over ordinary step, so many samples a micro-batch.
# Torch's own layers keep the attention's scores: one sample, and all but the smallest model compute
# them again in backward
cost() {
    local flags=(--micro-batch "$4" "${@:5}")
    if [[ $said != *$'\ntransformer-engine '[0-9]* ]]; then
        flags+=(--micro-batch 1)
        [[ $3 == 270m ]] || flags+=(-- --recompute-activations)
    fi
    [[ -z $rehearse ]] || flags=(--bag-size 2 --steps 1 -- --num-layers 1 --hidden-size 64
        --num-attention-heads 1 --kv-channels 64 --ffn-hidden-size 64 --seq-length 32
        --num-query-groups 1 --max-position-embeddings 32)
    step "$1" "$2" $python benchmarks/bench_step.py --csv "$out/step.csv" --model "$3" "${flags[@]}"
}

sizes() { either "-N 8192 -V 151936 18992" "-N 16 -V 1024 256"; }

part_first() {
    ready
    step kernels 60 $python tools/check_kernels.py --csv "$out/kernels.csv" $(either "" --small)
    loss loss 60 $(sizes) --dtype bf16 -s 1 16 --rounds 9 \
        --variants "ours, in place" ours "megatron, single"
    step embedding 50 $python benchmarks/bench_embedding.py --csv "$out/embedding.csv" \
        $(either "-V 128256 -H 4096 -b 2 -L 4096" "-V 500 -H 64 -b 2 -L 32") \
        -s 16 --dtype bf16 --rounds 5
    cost step 75 270m 4 --bag-size 6 --micro-batches 2 --steps 7
    loss peers 75 $(sizes) --dtype bf16 -s 16 --rounds 5 \
        --variants "te, single" "paper's loop, compiled" "lse + gather, compiled"
}

part_build() {
    compile
    # it asks for a GPU, or to be told that a CPU is meant
    [[ -z $listing$capability$rehearse ]] ||
        step doctor 20 $(either "" "env MEGATRON_TST_CPU=1") $python -m megatron_tst doctor
}

tests() { step "$1" "$2" $python -m pytest -p no:cacheprovider -q "${@:3}"; } # NAME LIMIT ...

part_test() {
    tests gpu 120 -m gpu tests/gpu --ignore "$graphs"
    tests extension 40 tests/unit/test_extension.py
    tests ranks 80 tests/distributed/test_layouts.py --backend gloo \
        -k "tp2 and dense and s3 and not sp and not cp2"
}

part_sanitize() {
    local tool
    for tool in memcheck racecheck synccheck initcheck; do
        step $tool 60 $python tools/sanitize.py --under $tool $(either "" --rehearse)
    done
}

part_bench() {
    loss large 120 $(sizes) --dtype bf16 -s 1 4 16 --rounds 9 --plot "$work/multi_hot_ce.png"
    pack "$work/multi_hot_ce.png"
    loss small 50 $(either "-N 1024 -V 32000" "-N 16 -V 512") -s 16 --dtype fp32
    step embedding 35 $python benchmarks/bench_embedding.py --csv "$out/embedding.csv" \
        $(either "" "-V 500 -H 64 -b 2 -L 32")
    step linear 35 $python benchmarks/bench_linear_loss.py --csv "$out/linear_loss.csv" \
        $(either "" "-N 64 -V 500 -H 64")
}

part_hints() {
    local name
    for name in plain_forward plain_store; do
        if [[ -n $rehearse ]]; then # nothing to compile: the extension that is there
            step build_$name 10 install -D -t "$work/$name/megatron_tst" megatron_tst/_C*.so
        else
            step build_$name 100 env NVCC_APPEND_FLAGS=-DMHCE_${name^^} \
                TORCH_CUDA_ARCH_LIST="$capability" $python setup.py build_ext \
                --build-lib "$work/$name" --build-temp "$work/$name/temp"
        fi
    done
    for name in plain_forward plain_store; do
        loss hinted_$name 30 $(sizes) --dtype bf16 -s 16 --rounds 15 \
            --variants "ours, in place" ours
        loss $name 30 $(sizes) --dtype bf16 -s 16 --rounds 15 --variants "ours, in place" ours \
            --extension "$name=$(echo "$work/$name"/megatron_tst/_C*.so)"
    done
}

part_fp8() {
    step recipes 150 $python tools/check_fp8.py "$work/fp8" \
        $(either "" "--reference fp32 --recipes bf16 --iterations 4 --seq-length 32")
    cost 270m 45 270m 4 --bag-size 6 --micro-batches 2 --steps 7 --precision fp8
    cost 600m 45 600m 2 --bag-size 6 --micro-batches 2 --steps 7 --precision fp8
}

part_train() {
    cost 270m 55 270m 4 --bag-size 6 --micro-batches 4 --steps 9
    cost 1.4b 75 1.4b 2 --bag-size 16 --micro-batches 4 --steps 7
    cost 600m 60 600m 2 --bag-size 6 --micro-batches 4 --steps 7
    step demo 50 $python examples/demo.py --out "$work/demo" \
        $(either "--device cuda" "--device cpu --iterations 20")
    pack "$work/demo/gpt/loss.png"
}

part_graphs() { tests full_iteration 120 -m gpu "$graphs"; }

# --- what is asked for

if [[ -n $asked ]]; then help; exit; fi
if ((${#parts[@]} == 0)); then read -ra parts <<< "${names#first }"; fi
for part in "${parts[@]}"; do
    [[ ${part%%-*} =~ $known ]] || want --part "${names% } or one of their steps" "${part:-nothing}"
    [[ $part != *-* || " $(steps_of "${part%%-*}") " == *" ${part#*-} "* ]] ||
        want --part "${part%%-*}- and one of: $(steps_of "${part%%-*}")" "$part"
done
[[ -n $(command -v "$python") ]] || want PYTHON "an interpreter" "$python"
[[ -n $out ]] || usage "expected a folder for the results, got none"
[[ ! -e $out || -d $out ]] || usage "expected a folder for the results, got $out"
[[ -z $extension ]] || extension=$(realpath "$extension")
[[ -z $wheels ]] || wheels=$(realpath "$wheels")
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
if [[ -f $out/steps.jsonl ]]; then
    before=$(grep -q rehearsed "$out/steps.jsonl" && echo 1)
    [[ $before == "$rehearse" ]] || usage "expected a new folder, got $out, which has results of \
$([[ -n $before ]] && echo a rehearsal || echo a GPU). Name another"
fi
cd "$(dirname "$0")/.." || exit 2
site=$PWD/build/gpu_check_site
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export CUDA_DEVICE_MAX_CONNECTIONS=1
[[ -z $rehearse ]] || export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
budget() { echo $(($(awk -v name="$1" '$1 == name {print $2}' <<< "$budgets") * factor)); }
deadline=$((SECONDS + 60 * factor)) part=wheels
[[ -z $wheels ]] || step wheels 60 $python tools/gpu_machine.py wheels "$wheels" "$site"
said=$($python tools/gpu_machine.py machine) || usage "$(tail -n 1 <<< "$said")"
capability=$(sed -n 's/^capability //p' <<< "$said")
[[ -n $capability || -n $rehearse || ${parts[*]} == build ]] ||
    usage "--part ${parts[*]}: expected an NVIDIA GPU that torch can use, got none. Without one \
there are --part build and --rehearse"
echo "$said" > "$out/machine.log" && pack "$out/machine.log"

# the other parts want an extension, which is no part of their time
if [[ ${parts[0]} != first && ${parts[0]} != build ]]; then
    part=build deadline=$((SECONDS + $(budget build)))
    ready
fi
for asked in "${parts[@]}"; do
    part=${asked%%-*} only="" deadline=$((SECONDS + $(budget "${asked%%-*}")))
    [[ $asked != *-* ]] || only=${asked#*-}
    [[ $part != first ]] || deadline=$(budget first) # since the script began
    "part_$part"
done
echo "== $failed failed; $out/report.md"
exit $failed
