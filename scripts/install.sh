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

# pip of the system's Python installs into the environment: Colab's and Debian's Python come without ensurepip.
rm -f "$venv/installed"
site=--clear
usable_torch "$python" && site=--system-site-packages
if "$python" -m pip --python "$python" --version >/dev/null 2>&1; then
    "$python" -m venv $site --without-pip "$venv"
    pip="$python -m pip --python $venv/bin/python"
else
    "$python" -m venv $site "$venv"
    pip="$venv/bin/python -m pip"
fi
install="$pip install -q --disable-pip-version-check --no-warn-script-location"
[ $site = --system-site-packages ] || $install "torch==$torch" -c requirements.lock
$install --no-deps -r requirements.lock
$install --no-deps -e .
touch "$venv/installed"
