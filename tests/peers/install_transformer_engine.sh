#!/bin/sh
# install_transformer_engine.sh PYTHON [WHEELS]: Transformer Engine's torch part, which has no
# public wheel, into PYTHON's environment, where
# torch and the other two parts are. From the folder WHEELS, or compiled from its source release
# (about 20 minutes of a CPU core; no GPU).
set -u
python=$1 wheels=${2:-}
fail() { echo "transformer engine: $*" >&2; exit 2; }
version=$("$python" -c "import importlib.metadata as m; print(m.version('transformer-engine'))") || fail "expected transformer-engine in $python's environment, got none. Install tests/peers/transformer_engine.txt first."
part=transformer-engine-torch==$version

pip() { "$python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"; }
if [ -n "$wheels" ]; then
    [ -d "$wheels" ] || fail "WHEELS: expected a folder, got $wheels"
    pip --no-index --find-links "$wheels" "$part" ||
        fail "WHEELS: expected a wheel of $part for this Python in $wheels, got none that fits. Leave WHEELS out to compile it."
else
    # its build asks nvcc for the version (nothing is compiled with it) and takes CUDA's headers
    # from there; NCCL's and cuDNN's come with torch
    toolkit=${CUDA_HOME:-/usr/local/cuda}
    [ -x "$toolkit/bin/nvcc" ] || fail "expected a CUDA 13 toolkit (headers and nvcc; no GPU), got no $toolkit/bin/nvcc. Set CUDA_HOME, or WHEELS=FOLDER with a wheel of $part."
    command -v "${CXX:-c++}" >/dev/null || fail "expected a C++ compiler, got none as ${CXX:-c++}. Install g++, or set WHEELS=FOLDER with a wheel of $part."
    site=$("$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    CPATH=$(printf '%s:' "$site"/nvidia/*/include)${CPATH:-}
    export CPATH CUDA_HOME="$toolkit" NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS="${MAX_JOBS:-$(nproc)}"
    echo "transformer engine: compiling $part, $MAX_JOBS files at a time"
    pip --no-build-isolation --no-binary transformer-engine-torch "$part" || fail "$part did not compile (above). Set WHEELS=FOLDER with a wheel of it."
fi
"$python" -c "import torch, transformer_engine.pytorch" ||
    fail "expected $part to import beside this torch, got the error above. A wheel fits only the torch that it was compiled with."
