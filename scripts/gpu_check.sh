#!/bin/sh
# What only a GPU can show, in one run of at most nine minutes: benchmarks/gpu_check.py, which writes a JSON file per step.
# Needs neither network nor root. On a machine without Duet's own environment it takes the wheels that scripts/gpu_wheels.sh
# left in build/wheels. OUT is the folder of the results (default build/gpu-check), PYTHON the interpreter.
#   sh scripts/gpu_check.sh                      on a GPU
#   sh scripts/gpu_check.sh --device cpu --tiny  the same steps anywhere, with sizes that say nothing
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=build/gpu-site
rm -rf "$site"
mkdir -p "$site"
"$python" scripts/link_names.py
if "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))'; then
    for wheel in build/wheels/*.whl; do # pip may be missing there: a wheel is a zip file
        [ ! -e "$wheel" ] || "$python" -m zipfile -e "$wheel" "$site"
    done
fi
PYTHONPATH="$PWD/build/names:$PWD/$site${PYTHONPATH:+:$PYTHONPATH}" exec "$python" benchmarks/gpu_check.py \
    --out "${OUT:-build/gpu-check}" "$@"
