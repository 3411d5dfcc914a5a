# pgdist in a container, for CPUs, GPUs or TPUs:
#
#     docker build --build-arg ACCELERATOR=cuda13 --tag REGISTRY/pgdist:v1 .
#     docker run --rm --gpus=all REGISTRY/pgdist:v1 launch.env
#
# ACCELERATOR is cpu, cuda12, cuda13 or tpu. Wheels alone are installed: nothing is compiled.
ARG PYTHON=3.11
ARG ACCELERATOR=cpu

FROM python:${PYTHON}-slim-bookworm AS base
ARG ACCELERATOR
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --uid=1000 --create-home pgdist
WORKDIR /opt/pgdist

# The packages, in a layer that changes in the code leave alone. The lock constrains what setup.py asks for.
COPY setup.py pyproject.toml requirements.lock LICENSE ./
COPY pgdist/__init__.py pgdist/
RUN extras="gcs,$ACCELERATOR" && extras="${extras%,cpu}" && \
    python -m pip install --constraint=requirements.lock setuptools && \
    python -m pip install --constraint=requirements.lock --no-build-isolation --editable ".[$extras]"

COPY . .
RUN python -m pip install --no-deps --no-build-isolation --editable . && \
    python -m compileall -q pgdist launch configs

# docker run IMAGE launch.train ...; on a cluster, submit starts launch.agent.
ENTRYPOINT ["python", "-m"]
CMD ["launch.env"]

FROM base AS for-cpu
ENV JAX_PLATFORMS=cpu
USER 1000

# Where GKE and NVIDIA's container toolkit put the driver; CUDA itself comes with JAX's wheels.
FROM base AS for-cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    PATH=/usr/local/nvidia/bin:$PATH
USER 1000

FROM for-cuda AS for-cuda12
FROM for-cuda AS for-cuda13

# As root: the chips are devices of the host that others may not open.
FROM base AS for-tpu

# hadolint ignore=DL3006
FROM for-${ACCELERATOR}
