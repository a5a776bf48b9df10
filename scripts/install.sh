#!/bin/sh
# Make the virtual environment in $1. torch comes first with its own dependencies, so that a GPU machine gets its CUDA
# libraries; the rest without, since unsloth asks for packages that a machine without a GPU does not need.
# A torch that the system's Python already has, as on Kaggle and Colab, is used as it is.
set -eu
venv=$1
python=${PYTHON:-python3}
torch=2.13.0

usable_torch() {
    "$1" - <<'PY' 2>/dev/null
import re, sys, torch
torch.ones(2) @ torch.ones(2)
version = tuple(map(int, re.match(r"(\d+)\.(\d+)", torch.__version__).groups()))
sys.exit(not (2, 4) <= version < (2, 15))
PY
}

rm -f "$venv/installed"
if usable_torch "$python"; then
    "$python" -m venv --system-site-packages "$venv"
else
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check "torch==$torch" -c requirements.lock
fi
"$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps -r requirements.lock
"$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps -e .
touch "$venv/installed"
