#!/bin/sh
# Download into build/wheels what scripts/gpu_check.sh needs on a machine that has Python 3.12, torch for CUDA, transformers,
# accelerate, peft, pyarrow, scipy, rich, click, safetensors and tokenizers, and no network: wheels for Linux on x86_64, in the
# versions that are installed in .venv (VENV=FOLDER names another). It fails above MOST_MB together (default 60).
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
wheels=build/wheels
most_mb=${MOST_MB:-60}
needed='pydantic pydantic-core annotated-types typing-inspection typing-extensions
    zarr numcodecs donfig google-crc32c absl-py six nltk defusedxml joblib
    pytest pluggy iniconfig hypothesis sortedcontainers'
wanted='bitsandbytes liger-kernel' # in this order, where they fit; the check says so where they are missing

# download NAME...: of the installed versions, without what they depend on, which is listed above or is on that machine
download() {
    # shellcheck disable=SC2046,SC2086 # names and versions are split at spaces
    "$venv/bin/python" -m pip --disable-pip-version-check download --quiet --dest "$wheels" --no-deps --only-binary :all: \
        --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_12_x86_64 \
        --platform manylinux_2_5_x86_64 --platform manylinux1_x86_64 --platform any \
        $("$venv/bin/python" -c 'import importlib.metadata as m, sys
def pinned(name):
    try: return f"{name}=={m.version(name)}"
    except m.PackageNotFoundError: return name
print(*map(pinned, sys.argv[1:]))' "$@")
}
size_mb() { cat "$wheels"/*.whl | wc -c | awk '{ print int($1 / 1e6) + 1 }'; }

rm -rf "$wheels"
mkdir -p "$wheels"
# shellcheck disable=SC2086
download $needed
# It is on offer as source only, all of it Python.
"$venv/bin/python" -m pip --disable-pip-version-check wheel --quiet --wheel-dir "$wheels" --no-deps --no-build-isolation rouge-score
for name in $wanted; do
    before=$(find "$wheels" -name '*.whl')
    if ! download "$name" || [ "$(size_mb)" -gt "$most_mb" ]; then
        echo "gpu_wheels: left out $name: not to be had, or more than $most_mb MB with it" >&2
        find "$wheels" -name '*.whl' | while read -r wheel; do
            case $before in *"$wheel"*) ;; *) rm "$wheel" ;; esac
        done
    fi
done
[ "$(size_mb)" -le "$most_mb" ] || {
    echo "error: $wheels has $(size_mb) MB, at most $most_mb were wanted" >&2
    echo "hint: set MOST_MB, or take packages off the list in scripts/gpu_wheels.sh" >&2
    exit 2
}
echo "gpu_wheels: $(find "$wheels" -name '*.whl' | wc -l) wheels, $(size_mb) MB in $wheels"
