#!/usr/bin/env bash
# Builds, tests and measures on a machine with an NVIDIA GPU, without network, in one call; everything it finds goes to OUT as files.
#
#     tools/gpu_check.sh OUT [build tests sanitizer benchmarks]     (all four by default)
#
# Needs Python >= 3.12 with torch for CUDA and a CUDA toolkit of the same major version; megatron-core and pytest in PYTHONPATH
# or installed (the steps that need what is missing say so). PYTHON=python3.12 chooses the interpreter. Exit code: number of failed steps.
set -uo pipefail
out=${1:?usage: tools/gpu_check.sh OUT [build tests sanitizer benchmarks]}; shift
steps=${*:-build tests sanitizer benchmarks}
mkdir -p "$out" && out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0
$python -c "import torch; assert torch.cuda.is_available()" 2>/dev/null || {
    echo "gpu_check: error: expected a torch that sees an NVIDIA GPU, got none ($python). Set PYTHON, or run it on a GPU machine." >&2
    exit 2
}

step() { # NAME COMMAND...: run, keep its output, report
    local name=$1 start=$SECONDS code; shift
    echo "== $name"
    "$@" > "$out/$name.log" 2>&1; code=$?
    if [ $code = 0 ]; then echo "   ok, $((SECONDS - start)) s"; else echo "   FAILED ($code), see $name.log:"; tail -5 "$out/$name.log"; failed=$((failed + 1)); fi
    return $code
}

machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
    nvcc --version | tail -2
    $python -c "import sys, torch; print(sys.version); print('torch', torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())"
    for package in megatron.core transformer_engine liger_kernel pytest; do
        $python -c "import $package; print('$package', getattr($package, '__version__', '?'))" 2>/dev/null || echo "$package: not there"
    done
}

build() { # for this GPU alone, which is all that can run here
    TORCH_CUDA_ARCH_LIST=$($python -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") \
        $python setup.py build_ext --inplace && $python -m megatron_tst.extension && { $python tools/doctor.py || true; }
}

bench() { $python benchmarks/bench_multi_hot_ce.py --rounds 15 --csv "$out/multi_hot_ce.csv" "$@"; }

step machine machine
case " $steps " in *" build "*) step build build ;; esac
case " $steps " in *" tests "*)
    step test_gpu $python -m pytest -p no:cacheprovider -q -m gpu tests/gpu
    step test_extension $python -m pytest -p no:cacheprovider -q tests/unit/test_extension.py ;;
esac
case " $steps " in *" sanitizer "*)
    for tool in memcheck racecheck synccheck; do
        step sanitizer_$tool compute-sanitizer --tool $tool --error-exitcode 9 $python tools/sanitize.py
    done ;;
esac
case " $steps " in *" benchmarks "*)
    step bench_large bench -N 8192 -V 151936 -s 1 4 16 --dtype bf16 --plot "$out/multi_hot_ce.png"
    step bench_small bench -N 1024 -V 32000 -s 1 4 16 --dtype bf16 fp32
    step bench_embedding $python benchmarks/bench_embedding.py --csv "$out/embedding.csv"
    step bench_linear $python benchmarks/bench_linear_loss.py --csv "$out/linear_loss.csv" ;;
esac
echo "== $failed failed; results in $out"
exit $failed
