# An image for NVIDIA GPUs. JAX's wheels bring CUDA, so the host only needs a driver for CUDA 13 and
# the NVIDIA container toolkit:
#
#   docker build --tag gkd_jax .
#   docker run --gpus all --volume "$PWD:/data" gkd_jax train --gin_file=gkd --gin.MODEL_DIR=/data/run ...
#
# A host whose driver is older takes CUDA 12: docker build --build-arg EXTRA=gpu-cuda12 ...
FROM python:3.12-slim

ARG EXTRA=gpu

WORKDIR /opt/gkd_jax
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt ".[${EXTRA},report]"

WORKDIR /data
ENTRYPOINT ["gkd-jax"]
