# make demo             set up, then train a small GPT with and without TST on CPU and draw both
# make test             set up, then run the fast tests: at most 12 minutes on two idle cores
# make test-slow        set up, then run the slow ones
# make test-wheel       install the wheel alone into a new environment, run every verb there
# make test-processors  set up, then run the numeric tests as other processors would compute them
# make test-main        set up .venv-main, whose Megatron is the checkout of Megatron-LM that
#                       MEGATRON_LM names (its main branch), then run there the tests that meet
#                       Megatron most, in about 11 minutes
# make test-bridge      set up .venv-bridge: Megatron-Bridge loads, resumes, exports what we export
# make test-modelopt    set up .venv-modelopt: ModelOpt's export against ours, and `quantize`
# make test-te          set up .venv-te: the real Transformer Engine, without a GPU. WHEELS=FOLDER
#                       has a wheel of transformer-engine-torch. Else it is compiled, with a CUDA 13
#                       toolkit and a C++ compiler, in about 20 minutes of a core
# make mutation         set up, then put in faults one at a time and see that a test fails at each:
#                       tests/mutation/README.md. Hours; MODULES="schedule ops" are some of it
# make bench            set up, then measure the superposition step against the ordinary one
# make matrix           set up, then write docs/parallelism.md's table
# make style            ruff, and the import contracts of pyproject.toml
#
# setup builds the C++/CUDA extension where a compiler (and a CUDA toolkit) is found, and says what
# it built. MEGATRON_TST_SKIP_CUDA=1 skips CUDA.
# Variables: PYTHON=python3.13 (interpreter), VENV=.venv (environment), ARCH=llama, qwen3, qwen3-moe
# or gpt-moe (the demo's model), OUT=demo_out (where the demo writes), SEED=1

VENV ?= .venv
OUT ?= demo_out
ARCH ?= gpt
SEED ?= 1
RUN = $(VENV)/bin/python

.PHONY: setup demo test test-slow test-wheel test-processors test-main test-bridge test-modelopt
.PHONY: test-te checkout-of-megatron
.PHONY: mutation bench matrix style clean

setup: $(VENV)/.ready

$(VENV)/.ready: constraints.txt pyproject.toml setup.py tools/find_python.sh $(wildcard csrc/*)
	@python="$$(PYTHON="$(PYTHON)" sh tools/find_python.sh)" && echo "setup: $$python -> $(VENV) (downloads torch the first time)" && "$$python" -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade "pip<27"
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch setuptools pybind11 ninja
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	@$(RUN) -m megatron_tst.extension
	@touch $@

demo: setup
	$(RUN) -m megatron_tst demo --out $(OUT) --seed $(SEED) --architecture $(if $(filter 1,$(MOE)),gpt-moe,$(ARCH))

PYTEST = $(RUN) -m pytest -n 2 --dist worksteal --durations=25

test: setup
	$(PYTEST) -m "not slow"

test-slow: setup
	$(PYTEST) -m slow

test-processors: setup
	$(RUN) tests/support/processors.py

test-wheel:
	@python="$$(PYTHON="$(PYTHON)" sh tools/find_python.sh)" && "$$python" tools/test_wheel.py

MAIN_TESTS = tests/unit tests/training tests/distributed tests/checkpoint/test_resume.py tests/checkpoint/test_stock.py tests/checkpoint/test_versions.py

MAIN_MEGATRON = "$$(.venv-main/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/megatron"

# The environment of constraints.txt with the checkout's packages in place of megatron-core's wheel.
test-main: checkout-of-megatron .venv-main/.ready
	ln -sfn "$(abspath $(MEGATRON_LM))/megatron" $(MAIN_MEGATRON)
	MEGATRON_LM="$(abspath $(MEGATRON_LM))" .venv-main/bin/python -m pytest -n 2 --dist worksteal --durations=25 -m "not slow" $(MAIN_TESTS)

checkout-of-megatron:
	@test -f "$(MEGATRON_LM)/megatron/core/package_info.py" || { echo "test-main: expected MEGATRON_LM to be a checkout of Megatron-LM, got '$(MEGATRON_LM)'. Clone https://github.com/NVIDIA/Megatron-LM and run: make test-main MEGATRON_LM=/path/to/Megatron-LM"; exit 2; }

.venv-main/.ready: constraints.txt pyproject.toml tools/find_python.sh
	python="$$(PYTHON="$(PYTHON)" sh tools/find_python.sh)" && "$$python" -m venv --clear .venv-main
	.venv-main/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip<27"
	MEGATRON_TST_SKIP_EXTENSION=1 .venv-main/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	.venv-main/bin/python -m pip uninstall --quiet --disable-pip-version-check --yes megatron-core
	rm -rf $(MAIN_MEGATRON)
	@touch $@

test-bridge: .venv-bridge/.ready
	PYTHONPATH=$(CURDIR) .venv-bridge/bin/python -m pytest tests/peers/test_bridge.py tests/peers/test_through_bridge.py

.venv-bridge/.ready: tests/peers/bridge.txt tools/find_python.sh
	python="$$(PYTHON="$(PYTHON)" sh tools/find_python.sh)" && "$$python" -m venv .venv-bridge
	.venv-bridge/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip<27"
	.venv-bridge/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement tests/peers/bridge.txt megatron-bridge==0.6.2
	@touch $@

test-modelopt: .venv-modelopt/.ready
	.venv-modelopt/bin/python -m pytest tests/peers/test_modelopt.py

.venv-modelopt/.ready: constraints-modelopt.txt pyproject.toml tools/find_python.sh
	@python="$$(PYTHON="$(PYTHON)" sh tools/find_python.sh)" && "$$python" -m venv .venv-modelopt
	.venv-modelopt/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip<27"
	MEGATRON_TST_SKIP_EXTENSION=1 .venv-modelopt/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-modelopt.txt \
		--editable ".[modelopt]" pytest pytest-timeout tensorboard
	@touch $@

test-te: .venv-te/.ready
	PYTHONPATH=$(CURDIR) .venv-te/bin/python -m pytest tests/peers/test_transformer_engine.py

.venv-te/.ready: constraints.txt tests/peers/transformer_engine.txt tests/peers/install_transformer_engine.sh tools/find_python.sh
	python="$$(PYTHON="$(PYTHON)" sh tools/find_python.sh)" && "$$python" -m venv .venv-te
	.venv-te/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip<27"
	.venv-te/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement tests/peers/transformer_engine.txt
	sh tests/peers/install_transformer_engine.sh .venv-te/bin/python "$(WHEELS)"
	@touch $@

MUTATION = build/mutation/packages

mutation: setup $(MUTATION)/.ready
	$(RUN) tests/mutation/run.py --bugs
	$(RUN) tests/mutation/run.py --packages $(MUTATION) $(MODULES)

$(MUTATION)/.ready: tests/mutation/requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade --target $(MUTATION) --requirement $<
	@touch $@

bench: setup
	$(RUN) benchmarks/bench_step.py

matrix: setup
	$(RUN) -m pytest tests/distributed --parallel-report docs/parallelism.json
	$(RUN) tools/parallel_matrix.py --write docs/parallelism.md

style: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) .venv-main .venv-bridge .venv-modelopt .venv-te build *.egg-info megatron_tst/_C*.so
