#!/bin/sh
# Print the first Python >= 3.12 with venv: $PYTHON, the usual names, pyenv's. Says what to install
# if there is none.
ok() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

if [ -n "$PYTHON" ]; then
  ok "$PYTHON" && { echo "$PYTHON"; exit 0; }
  echo "setup: expected PYTHON=$PYTHON to be a Python >= 3.12 with the venv module, and it is not. Leave PYTHON out to have one found." >&2
  exit 1
fi
for python in python3.12 python3.13 python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23].*/bin/python; do
  ok "$python" && { "$python" -c 'import sys; print(sys.executable)'; exit 0; }
done
cat >&2 <<'TEXT'
setup: expected a Python >= 3.12 with the venv module (megatron-core needs it); found none among python3.12, python3.13, python3 and pyenv's.
Install one, no root needed: `pyenv install 3.12` or `uv python install 3.12`; with root: `apt-get install python3.12 python3.12-venv`.
Then run make again, or name it: make PYTHON=/path/to/python3.12 ...
TEXT
exit 1
