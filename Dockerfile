# syntax=docker/dockerfile:1
# A public image of PyTorch, what the tests and the audit need, and this folder. docs/pod.md says
# how to use it.
#
#     docker build --tag golf .
#     docker run --rm --network none golf              # tools/container_check.sh, everything
#     docker run --rm --gpus all --ipc host -it golf bash    # docs/pod.md has the volumes

ARG IMAGE=pytorch/pytorch:2.10.0-cuda12.8-cudnn9-runtime
FROM ${IMAGE}

# Triton compiles its kernels' launchers with gcc and Python's headers. git names the commit that a
# script equals, bubblewrap and strace isolate and watch the audit's evaluations.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        bubblewrap gcc git iproute2 libc6-dev make python3-dev strace \
    && rm -rf /var/lib/apt/lists/*

# The image's torch stays, and with it its triton: the tests' own choice is for a torch without one.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1
COPY requirements.txt requirements-dev.txt /tmp/
RUN grep -v '^triton' /tmp/requirements-dev.txt > /tmp/requirements-image.txt \
    && python3 -m pip install -r /tmp/requirements.txt -r /tmp/requirements-image.txt

# Nobody needs root to train. Named volumes put on these folders are the user's, as the folders are.
RUN useradd --create-home --shell /bin/bash golf \
    && install --directory --owner golf --group golf /home/golf/golf /home/golf/cache
USER golf
WORKDIR /home/golf/golf
ENV TORCHINDUCTOR_CACHE_DIR=/home/golf/cache/inductor TRITON_CACHE_DIR=/home/golf/cache/triton
COPY --chown=golf:golf . .
RUN mkdir -p data/datasets data/tokenizers logs

# An image that cannot train, score and audit is not made.
RUN --network=none CHECK=quick tools/container_check.sh

CMD ["tools/container_check.sh"]
