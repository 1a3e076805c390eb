#!/bin/sh
# Install Debian's Slurm and munge where they are missing. Needs root, for apt-get: nothing else here is installed for the whole machine.
set -eu
if command -v sbatch >/dev/null && command -v munged >/dev/null; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "error: Slurm is not installed, and only root can install it, on Debian or Ubuntu" >&2
    echo "hint: have somebody run: apt-get install slurm-wlm munge" >&2
    exit 2
fi
echo "installing slurm-wlm and munge" >&2
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
