#!/usr/bin/env bash
# Builds, tests and measures on a machine with one NVIDIA GPU, without network. Everything it finds
# goes to OUT as files; OUT/report.md sums up.
#
#     tools/gpu_check.sh [--part build|test|bench|fp8|train]... [--wheels DIR] [OUT]        all parts by default; OUT by default $OUT
#
#     build   the extension for this GPU, no kernel may spill registers; on a machine without a GPU it is compiled for sm_90 and sm_100, beside
#     test    tests/gpu, two tensor-parallel ranks on the GPU over gloo, compute-sanitizer
#     bench   benchmarks/ with all peers that are installed
#     fp8     a small mixture-of-experts model in every recipe that the GPU runs, against bf16, in both phases
#     train   the demo in bf16; the superposed step against the ordinary one at the shapes of 270M and 600M
#
# Each part is meant to take under ten minutes and may be called alone (build first on each
# machine): OUT keeps what the others found, and the report
# is written anew.
# Needs Python 3.12 with torch for CUDA, nvcc of the same major version, megatron-core and pytest.
# Python packages that are missing are taken
# from the wheels in DIR (for FP8: Transformer Engine's three) and put into build/gpu_check_site,
# not among the machine's own.
# PYTHON=python3.12 chooses the interpreter. Exit code: the number of failed steps; 2 with a message
# where nothing could be started.
set -uo pipefail
usage() { echo "gpu_check: error: $1" >&2; sed -n '4p' "$0" | cut -c3- >&2; exit 2; }
parts=() wheels="" out=${OUT:-}
while (($#)); do
    case $1 in
        --part) parts+=("${2:-}"); shift 2 || usage "--part: expected build, test, bench, fp8 or train, got nothing" ;;
        --wheels) wheels=${2:-}; shift 2 || usage "--wheels: expected a folder, got nothing"
            [[ -d $wheels ]] || usage "--wheels: expected a folder, got $wheels" ;;
        -*) usage "expected --part or --wheels, got $1" ;;
        *) out=$1; shift ;;
    esac
done
((${#parts[@]})) || parts=(build test bench fp8 train)
for part in "${parts[@]}"; do
    [[ $part =~ ^(build|test|bench|fp8|train)$ ]] || usage "--part: expected build, test, bench, fp8 or train, got $part"
done
[[ -n $out ]] || usage "expected a folder for the results, got none"
mkdir -p "$out" && out=$(cd "$out" && pwd) && [[ -z $wheels ]] || wheels=$(cd "$wheels" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3} site=$PWD/build/gpu_check_site failed=0
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 CUDA_DEVICE_MAX_CONNECTIONS=1
$python -c "import torch" 2>/dev/null || usage "expected a Python with torch, got $python ($(command -v "$python" || echo not there)). Set PYTHON."
capability=$($python -c "import torch; print('%d.%d' % torch.cuda.get_device_capability() if torch.cuda.is_available() else '')" 2>/dev/null)
[[ -n $capability || ${parts[*]} == build ]] ||
    usage "--part ${parts[*]}: expected an NVIDIA GPU that torch can use, got none. Without one there is --part build."

step() { # NAME COMMAND...: run, keep its output and how it ended
    local name=$1 start=$SECONDS code; shift
    echo "== $part: $name"
    "$@" > "$out/$name.log" 2>&1; code=$?
    if [[ $code == 0 ]]; then echo "   ok, $((SECONDS - start)) s"; else
        echo "   FAILED ($code), see $name.log:"; tail -5 "$out/$name.log"; failed=$((failed + 1))
    fi
    printf '{"part": "%s", "step": "%s", "code": %d, "seconds": %d}\n' "$part" "$name" "$code" $((SECONDS - start)) >> "$out/steps.jsonl"
}

machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv || echo "no nvidia-smi"
    nvcc --version | tail -2
    $python -c "import sys, torch; print('python', sys.version); print('torch', torch.__version__)
if torch.cuda.is_available(): print('gpu', torch.cuda.get_device_name(), 'sm_%d%d' % torch.cuda.get_device_capability())"
    $python tools/gpu_report.py versions
    git rev-parse --short HEAD 2> /dev/null || true
}

part_build() {
    if [[ -n $capability ]]; then # in place: what the other parts use
        TORCH_CUDA_ARCH_LIST=$capability step compile $python setup.py build_ext --inplace --force
    else
        TORCH_CUDA_ARCH_LIST="9.0 10.0" step compile $python setup.py build_ext --build-lib "$out/lib" --build-temp "$out/temp"
    fi
    local architectures="sm_90 sm_100"; [[ -z $capability ]] || architectures=sm_${capability/./}
    step resources $python tools/gpu_report.py resources "$out/compile.log" "$out/resources.json" $architectures
    [[ -z $capability ]] || step doctor $python -m megatron_tst doctor
}

part_test() {
    step test_gpu $python -m pytest -p no:cacheprovider -q -m gpu tests/gpu
    step test_extension $python -m pytest -p no:cacheprovider -q tests/unit/test_extension.py
    step test_tp2_training $python -m pytest -p no:cacheprovider -q tests/distributed/test_layouts.py --backend gloo -k "tp2 and dense and s3 and not sp and not cp2"
    for tool in memcheck racecheck synccheck; do
        step sanitizer_$tool compute-sanitizer --tool $tool --error-exitcode 9 $python tools/sanitize.py
    done
}

part_bench() {
    step bench_large $python benchmarks/bench_multi_hot_ce.py --rounds 15 --csv "$out/multi_hot_ce.csv" -N 8192 -V 151936 -s 1 4 16 --dtype bf16 --plot "$out/multi_hot_ce.png"
    step bench_small $python benchmarks/bench_multi_hot_ce.py --rounds 15 --csv "$out/multi_hot_ce.csv" -N 1024 -V 32000 -s 1 4 16 --dtype bf16 fp32
    step bench_embedding $python benchmarks/bench_embedding.py --csv "$out/embedding.csv"
    step bench_linear $python benchmarks/bench_linear_loss.py --csv "$out/linear_loss.csv"
}

part_fp8() { step fp8 $python tools/check_fp8.py "$out/fp8"; }

part_train() {
    step demo $python examples/demo.py --device cuda --out "$out/demo"
    bench() { $python benchmarks/bench_step.py --csv "$out/step.csv" "$@"; }
    step step_270m bench --model 270m --bag-size 6 --micro-batch 4 --micro-batches 4
    step step_600m bench --model 600m --bag-size 6 --micro-batch 2 --micro-batches 4
    step step_270m_fp8 bench --model 270m --bag-size 6 --micro-batch 4 --micro-batches 4 --precision fp8
    step step_600m_fp8 bench --model 600m --bag-size 6 --micro-batch 2 --micro-batches 4 --precision fp8
}

[[ -z $wheels ]] || part=wheels step wheels $python tools/gpu_report.py wheels "$wheels" "$site"
part=machine step machine machine
for part in "${parts[@]}"; do "part_$part"; done
$python tools/gpu_report.py report "$out"
echo "== $failed failed; $out/report.md"
exit $failed
