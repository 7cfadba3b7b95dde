# dsvae in an image, for CPUs or for NVIDIA GPUs:
#
#   docker build --tag dsvae .
#   docker build --tag dsvae --build-arg BASE=nvidia/cuda:TAG-devel-ubuntu24.04 \
#       --build-arg TORCH_INDEX= .
#   docker run --rm --volume "$PWD/runs:/home/dsvae/runs" dsvae train --ds_config zero2
#
# BASE is any Debian or Ubuntu with Python 3.10 or newer, TAG a release of CUDA. TORCH_INDEX is where pip finds torch;
# empty: the package index, whose builds have CUDA 13.
ARG BASE=debian:13-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive PATH=/opt/dsvae/bin:$PATH
# A compiler and libaio for NVMe offload and torch.compile; the headers of Python for both.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates g++ libaio-dev ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/dsvae
COPY . /src
# pyproject.toml has the bounds.
# hadolint ignore=DL3013
RUN bounds=$(sed -n 's/^ *"torch\([<>=].*\)",$/\1/p' /src/pyproject.toml) \
    && pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch$bounds" \
    && pip install --no-cache-dir /src \
    && rm -rf /src \
    && dsvae --version
WORKDIR /home/dsvae
ENTRYPOINT ["dsvae"]
