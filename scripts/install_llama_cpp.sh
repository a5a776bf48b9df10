#!/bin/sh
# Build llama.cpp's Python binding into the virtual environment $1 (minutes: it is compiled) and lay llama.cpp's converter of
# the same version into $1/share/llama.cpp. Both come out of one source package. CMAKE_ARGS chooses how it is built, such as
# CMAKE_ARGS=-DGGML_CUDA=on.
set -eu
venv=$1
python=${PYTHON:-python3}
version=0.3.36

if "$python" -m pip --python "$python" --version >/dev/null 2>&1; then
    pip="$python -m pip --python $venv/bin/python"
else
    pip="$venv/bin/python -m pip"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
$pip download -q --no-deps --no-binary llama-cpp-python -d "$work" "llama-cpp-python==$version"
tar xzf "$work"/llama_cpp_python-*.tar.gz -C "$work"
source=$(echo "$work"/llama_cpp_python-*/vendor/llama.cpp)
mkdir -p "$venv/share/llama.cpp"
for part in convert_hf_to_gguf.py conversion gguf-py LICENSE; do
    rm -rf "$venv/share/llama.cpp/$part"
    cp -R "$source/$part" "$venv/share/llama.cpp/"
done
$pip install -q --disable-pip-version-check --no-warn-conflicts -c requirements.lock "$work"/llama_cpp_python-*.tar.gz
touch "$venv/share/llama.cpp/installed"
