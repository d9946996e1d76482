#!/usr/bin/env bash
# Runs every CPU kernel of the extension under AddressSanitizer and UndefinedBehaviorSanitizer: a
# build of its own, in a temporary folder.
#
#     PYTHON=.venv/bin/python tools/address_sanitizer.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
here=$(mktemp -d) && trap 'rm -rf "$here"' EXIT
cp -r megatron_tst csrc setup.py pyproject.toml README.md LICENSE tools "$here" && rm -f "$here"/megatron_tst/_C*.so
case "$python" in /*) ;; *) python=$PWD/$python ;; esac
cd "$here"
# without the versions for wider processors: their resolver runs before the sanitizer is ready
export MEGATRON_TST_SKIP_CUDA=1 CFLAGS="-fsanitize=address,undefined -fno-omit-frame-pointer -g -DMHCE_ONE_TARGET" LDFLAGS="-fsanitize=address,undefined"
"$python" setup.py build_ext --inplace > build.log 2>&1 || { tail -20 build.log; exit 1; }
# torch and Python free nothing at exit, so leaks say nothing
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 \
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH="$here" CUDA_VISIBLE_DEVICES= "$python" tools/sanitize.py
