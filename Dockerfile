# docker build --build-arg DEVICE=cpu -t duet:cpu .      (docs/containers.md)
# docker build --build-arg DEVICE=gpu -t duet:gpu .
# What is installed is what `make setup` installs, by the same script and pins; the driver of a GPU comes from the host.
ARG BASE=python:3.11-slim-bookworm
FROM $BASE

ARG DEVICE=cpu
ARG EXTRAS=datasets,s3,8bit,tensorboard

# A C compiler: vLLM and torch compile kernels when they run.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ libc6-dev libnuma1 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/duet
COPY pyproject.toml README.md LICENSE constraints.txt constraints-cpu.txt ./
COPY scripts/setup.sh scripts/setup.sh
COPY api api
COPY cache cache
COPY stages stages
COPY pipeline pipeline
RUN DEVICE=$DEVICE EXTRAS=$EXTRAS VENV=/opt/venv PIP_NO_CACHE_DIR=1 sh scripts/setup.sh
COPY configs configs
COPY lab lab

RUN useradd --create-home --uid 1000 duet && mkdir /data && chown duet /data
USER duet
WORKDIR /data
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
ENTRYPOINT ["duet"]
CMD ["--help"]
