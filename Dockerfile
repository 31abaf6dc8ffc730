# All of loraline's images. Targets:
#   cpu      every stage, with PyTorch for CPUs
#   cuda     every stage, with PyTorch for NVIDIA GPUs (the driver comes from the machine)
#   rocm     every stage, with PyTorch for AMD GPUs; wants --build-arg ROCM_INDEX
#   worker   Prefect's server, and its workers for docker, Kubernetes, ECS and Vertex AI; no PyTorch, no stages
#
#   docker build --target cpu --build-arg LORALINE_REVISION=$(git rev-parse HEAD) -t loraline:cpu .
#
# Libraries are one layer, the code is another: a change of code rebuilds in seconds and pushes less than a megabyte.
# Without a connection to PyTorch's index: put its wheels into an image (FROM scratch, COPY *.whl /) and name that one as
# WHEELS_IMAGE.
ARG BASE_IMAGE=python:3.11-slim-bookworm
ARG WHEELS_IMAGE=scratch

FROM ${WHEELS_IMAGE} AS wheels


# What to install, as lists. Only a change of these lists, not every change of pyproject.toml, installs anything anew.
FROM ${BASE_IMAGE} AS requirements
WORKDIR /requirements
COPY pyproject.toml docker/requirements.py ./
RUN python3 requirements.py


# A virtual environment to fill, and the smallest of init processes. Compilers may come here, never further.
FROM ${BASE_IMAGE} AS build
# uv installs as pip does, in a fraction of the time; of several indexes it shall take the best version, as pip does.
ENV PATH=/opt/venv/bin:/opt/uv/bin:$PATH \
    VIRTUAL_ENV=/opt/venv \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    UV_CACHE_DIR=/var/cache/uv \
    UV_LINK_MODE=copy \
    UV_INDEX_STRATEGY=unsafe-best-match \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
# Debian's mirrors keep only the newest version of a package: a pin would break the build one day.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*
ARG UV_VERSION=0.13.9
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir --target /opt/uv "uv==$UV_VERSION" \
    && echo /opt/loraline > "$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/loraline.pth"
COPY docker/prune.sh /usr/local/bin/prune-libraries
COPY docker/compile.sh /usr/local/bin/compile-bytecode
COPY docker/constraints.txt /opt/constraints.txt


FROM build AS build-cpu
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu
COPY --from=requirements /requirements/torch.txt /requirements/
RUN --mount=type=bind,from=wheels,target=/wheels --mount=type=cache,target=/var/cache/uv \
    uv pip install --find-links /wheels ${CPU_INDEX:+--extra-index-url "$CPU_INDEX"} \
        --constraint /opt/constraints.txt --requirement /requirements/torch.txt
COPY --from=requirements /requirements/stages.txt /requirements/
RUN --mount=type=cache,target=/var/cache/uv \
    uv pip install --constraint /opt/constraints.txt --requirement /requirements/stages.txt \
    && prune-libraries /opt/venv \
    && compile-bytecode /opt/venv


FROM build AS build-cuda
COPY --from=requirements /requirements/torch.txt /requirements/
RUN --mount=type=cache,target=/var/cache/uv \
    uv pip install --constraint /opt/constraints.txt --requirement /requirements/torch.txt
COPY --from=requirements /requirements/stages.txt /requirements/
RUN --mount=type=cache,target=/var/cache/uv \
    uv pip install --constraint /opt/constraints.txt --requirement /requirements/stages.txt \
    && prune-libraries /opt/venv \
    && compile-bytecode /opt/venv


FROM build AS build-rocm
# One of https://download.pytorch.org/whl/rocm*: which one goes with the pinned PyTorch, its own site says.
ARG ROCM_INDEX
COPY --from=requirements /requirements/torch.txt /requirements/
RUN --mount=type=cache,target=/var/cache/uv \
    uv pip install --extra-index-url "${ROCM_INDEX:?give --build-arg ROCM_INDEX, see the Dockerfile}" \
        --constraint /opt/constraints.txt --requirement /requirements/torch.txt
COPY --from=requirements /requirements/stages.txt /requirements/
RUN --mount=type=cache,target=/var/cache/uv \
    uv pip install --constraint /opt/constraints.txt --requirement /requirements/stages.txt \
    && prune-libraries /opt/venv \
    && compile-bytecode /opt/venv


FROM build AS build-worker
COPY --from=requirements /requirements/worker.txt /requirements/
RUN --mount=type=cache,target=/var/cache/uv \
    uv pip install --constraint /opt/constraints.txt --requirement /requirements/worker.txt \
    && prune-libraries /opt/venv \
    && compile-bytecode /opt/venv


# loraline itself, the same for every target.
FROM build AS code
RUN --mount=type=cache,target=/var/cache/uv uv pip install --constraint /opt/constraints.txt 'setuptools>=77'
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY stages stages
COPY flows flows
RUN pip install --no-cache-dir --no-deps --no-index --no-build-isolation --no-compile --target /opt/loraline . \
    && cp /opt/constraints.txt /opt/loraline/constraints.txt \
    && compile-bytecode /opt/loraline


# What the finished images have in common: a user who owns nothing, and one place to write to, /tmp.
FROM ${BASE_IMAGE} AS runtime
COPY --from=build /usr/bin/tini-static /usr/local/bin/tini
COPY docker/entrypoint.sh /usr/local/bin/loraline-entrypoint
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp/loraline --shell /usr/sbin/nologin loraline \
    && mkdir -p /srv/loraline/.loraline \
    && chown -R loraline:loraline /srv/loraline
ENV PATH=/opt/venv/bin:/opt/loraline/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp/loraline \
    USER=loraline \
    HF_HOME=/tmp/loraline/huggingface \
    PREFECT_HOME=/tmp/loraline/prefect \
    PREFECT_SERVER_UI_STATIC_DIRECTORY=/tmp/loraline/ui \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DO_NOT_TRACK=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /srv/loraline
USER 10001:10001
ENTRYPOINT ["/usr/local/bin/tini", "--", "/usr/local/bin/loraline-entrypoint"]


FROM runtime AS worker
COPY --from=build-worker /opt/venv /opt/venv
CMD ["prefect", "version"]
ARG LORALINE_REVISION=unknown
ENV LORALINE_REVISION=${LORALINE_REVISION}
LABEL org.opencontainers.image.title="loraline worker" \
      org.opencontainers.image.description="Prefect's server and workers, as loraline is tested with" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${LORALINE_REVISION}"


# The virtual environment comes before everything that changes with the code. `docker run IMAGE doctor` is the health check.
FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LORALINE_CONSTRAINTS=/opt/loraline/constraints.txt
COPY --from=build-cuda /opt/venv /opt/venv
COPY --from=code /opt/loraline /opt/loraline
CMD ["--help"]
ARG LORALINE_REVISION=unknown
ENV LORALINE_REVISION=${LORALINE_REVISION}
LABEL org.opencontainers.image.title="loraline" \
      org.opencontainers.image.description="Captioned images in, a published Stable Diffusion 3 LoRA out (CUDA)" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${LORALINE_REVISION}"


FROM runtime AS rocm
ENV LORALINE_CONSTRAINTS=/opt/loraline/constraints.txt
COPY --from=build-rocm /opt/venv /opt/venv
COPY --from=code /opt/loraline /opt/loraline
CMD ["--help"]
ARG LORALINE_REVISION=unknown
ENV LORALINE_REVISION=${LORALINE_REVISION}
LABEL org.opencontainers.image.title="loraline" \
      org.opencontainers.image.description="Captioned images in, a published Stable Diffusion 3 LoRA out (ROCm)" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${LORALINE_REVISION}"


# The last target is the one that `docker build .` makes.
FROM runtime AS cpu
ENV LORALINE_CONSTRAINTS=/opt/loraline/constraints.txt
COPY --from=build-cpu /opt/venv /opt/venv
COPY --from=code /opt/loraline /opt/loraline
CMD ["--help"]
ARG LORALINE_REVISION=unknown
ENV LORALINE_REVISION=${LORALINE_REVISION}
LABEL org.opencontainers.image.title="loraline" \
      org.opencontainers.image.description="Captioned images in, a published Stable Diffusion 3 LoRA out (CPU)" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${LORALINE_REVISION}"
