# syntax=docker/dockerfile:1
# The images of Tickserve, one target each (docs/images.md):
#
#   docker build --target server     -t tickserve-server     .   NVIDIA Triton for production: GPU or CPU
#   docker build --target server-cpu -t tickserve-server-cpu .   the embedded Triton, for CI and sidecars, loopback only
#   docker build --target train      -t tickserve-train      .   data, features, training, export
#   docker build --target loadtest   -t tickserve-loadtest   .   Locust, against a server elsewhere
#   docker build --target sbom --output type=local,dest=sbom .   what Python packages are in each, as CycloneDX
#
# Both servers read the model repository from /models: mount it, read-only. Without the mount they do not start.
# Pin a base by digest: --build-arg TRITON_DIGEST=sha256:... (PYTHON_DIGEST for the others). The defaults are empty, because
# a digest is read from your registry and never invented: without one, the tag decides what you get, and the build says so.

ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver
ARG TRITON_TAG=26.06-py3
ARG TRITON_DIGEST=
ARG PYTHON_IMAGE=docker.io/library/python
ARG PYTHON_TAG=3.11-slim-bookworm
ARG PYTHON_DIGEST=
# What the labels say of the source: --build-arg REVISION=$(git rev-parse HEAD) and SOURCE=<the address of the repository>.
ARG SOURCE=
ARG REVISION=
ARG VERSION=0.1.0

# ---------------------------------------------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE}:${PYTHON_TAG}${PYTHON_DIGEST:+@${PYTHON_DIGEST}} AS python-base
ARG PYTHON_IMAGE
ARG PYTHON_TAG
ARG PYTHON_DIGEST
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/tickserve \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
LABEL org.opencontainers.image.vendor="Tickserve contributors" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}:${PYTHON_TAG}" \
      org.opencontainers.image.base.digest="${PYTHON_DIGEST}"
RUN { [ -n "${PYTHON_DIGEST}" ] || echo "WARNING: PYTHON_DIGEST is empty, so a tag decides what this image is built on" >&2; } \
    && python -m venv /opt/venv
COPY LICENSE /opt/tickserve/

# ---------------------------------------------------------------------------------------------------------------------
FROM python-base AS serve-libraries
COPY requirements-serve.lock /opt/
RUN pip install --no-cache-dir --require-hashes -r /opt/requirements-serve.lock && pip check

# ---------------------------------------------------------------------------------------------------------------------
# The backend that scores in the server's own process, compiled here; the compiler stays behind.
FROM serve-libraries AS native-backend
COPY requirements-build.lock /opt/
RUN pip install --no-cache-dir --require-hashes --target /opt/compiler -r /opt/requirements-build.lock
COPY tickserve /opt/tickserve/tickserve
COPY serving /opt/tickserve/serving
RUN PYTHONPATH=/opt/tickserve:/opt/compiler python -m serving.native

# ---------------------------------------------------------------------------------------------------------------------
# The stage `serving` with the extra [triton] and nothing else: no torch, no training. The embedded Triton listens on
# loopback, so `--publish` reaches nothing: share its network namespace (a container of the same pod, `--network
# container:<name>`, or `--network host`). It loads its backends from /tmp: with a read-only root, `--tmpfs /tmp:exec`.
# Production is the target `server`.
FROM serve-libraries AS server-cpu
LABEL org.opencontainers.image.title="tickserve-server-cpu" \
      org.opencontainers.image.description="Tickserve on the embedded Triton, loopback only: laptops, CI, sidecars."
COPY tickserve /opt/tickserve/tickserve
COPY market /opt/tickserve/market
COPY models /opt/tickserve/models
COPY export /opt/tickserve/export
COPY serving /opt/tickserve/serving
COPY --from=native-backend /opt/tickserve/serving/backends/native/*.so /opt/tickserve/serving/backends/native/
USER 1000:1000
WORKDIR /tmp
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
ENTRYPOINT ["python", "-m", "tickserve.cli"]
CMD ["serve", "--repository", "/models"]
ARG SOURCE
ARG REVISION
ARG VERSION
LABEL org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.version="${VERSION}"

# ---------------------------------------------------------------------------------------------------------------------
# TORCH_INDEX chooses PyTorch's wheels: its CPU and CUDA builds are different files of one version, so torch has no hash.
# Empty, it is pip's own index.
FROM python-base AS train
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
LABEL org.opencontainers.image.title="tickserve-train" \
      org.opencontainers.image.description="Tickserve from market data to a published model: features, training, export."
COPY requirements-train.lock /opt/
# DL3013 cannot see that TORCH carries its own version.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --no-deps --require-hashes -r /opt/requirements-train.lock \
    && pip install --no-cache-dir ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "${TORCH}" \
    && pip check
COPY tickserve /opt/tickserve/tickserve
COPY market /opt/tickserve/market
COPY models /opt/tickserve/models
COPY export /opt/tickserve/export
COPY training /opt/tickserve/training
COPY serving /opt/tickserve/serving
COPY --from=native-backend /opt/tickserve/serving/backends/native/*.so /opt/tickserve/serving/backends/native/
COPY loadtest /opt/tickserve/loadtest
COPY monitoring /opt/tickserve/monitoring
# numba compiles the feature kernels here, once, and keeps them where the user of the image may read and add to them.
ENV NUMBA_CACHE_DIR=/opt/numba-cache \
    MPLCONFIGDIR=/tmp/matplotlib
RUN mkdir -p /opt/numba-cache /work \
    && python -m tickserve.features.compile \
    && chown -R 1000:1000 /opt/numba-cache /work
USER 1000:1000
WORKDIR /work
# Jobs run to their end and answer with an exit code; there is no port to ask for health.
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "tickserve.cli"]
CMD ["--help"]
ARG SOURCE
ARG REVISION
ARG VERSION
LABEL org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.version="${VERSION}"

# ---------------------------------------------------------------------------------------------------------------------
# Locust against a server elsewhere: neither torch nor an embedded server. Results go where --out says; /work is a mount.
FROM python-base AS loadtest
LABEL org.opencontainers.image.title="tickserve-loadtest" \
      org.opencontainers.image.description="Tickserve's load test with Locust, against a server elsewhere."
COPY requirements-loadtest.lock /opt/
RUN pip install --no-cache-dir --require-hashes -r /opt/requirements-loadtest.lock && pip check
COPY tickserve /opt/tickserve/tickserve
COPY export /opt/tickserve/export
COPY loadtest /opt/tickserve/loadtest
ENV MPLCONFIGDIR=/tmp/matplotlib
RUN mkdir -p /work && chown 1000:1000 /work
USER 1000:1000
WORKDIR /work
# It runs to its end and answers with an exit code; there is no port to ask for health.
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "tickserve.cli"]
CMD ["loadtest", "run", "--help"]
ARG SOURCE
ARG REVISION
ARG VERSION
LABEL org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.version="${VERSION}"

# ---------------------------------------------------------------------------------------------------------------------
# What the repository sync needs, for the Python that NVIDIA's image has, and nothing that has to be compiled.
FROM ${TRITON_IMAGE}:${TRITON_TAG}${TRITON_DIGEST:+@${TRITON_DIGEST}} AS sync-libraries
ARG TRITON_DIGEST
COPY requirements-sync.lock /opt/
RUN { [ -n "${TRITON_DIGEST}" ] || echo "WARNING: TRITON_DIGEST is empty, so a tag decides what this image is built on" >&2; } \
    && python3 -m pip install --no-cache-dir --require-hashes --only-binary=:all: --target /opt/sync/lib -r /opt/requirements-sync.lock

# ---------------------------------------------------------------------------------------------------------------------
# What Python packages each image holds, as CycloneDX 1.6. The packages of the base's system are not in it: your registry's
# scanner, or `docker buildx build --sbom=true`, lists those.
FROM python-base AS sbom-tool
COPY requirements-sbom.lock /opt/
RUN python -m venv /opt/sbom \
    && /opt/sbom/bin/pip install --no-cache-dir --require-hashes -r /opt/requirements-sbom.lock

FROM server-cpu AS sbom-server-cpu
COPY --from=sbom-tool /opt/sbom /opt/sbom
RUN /opt/sbom/bin/cyclonedx-py environment --output-reproducible --output-file /tmp/sbom.json /opt/venv/bin/python

FROM train AS sbom-train
COPY --from=sbom-tool /opt/sbom /opt/sbom
RUN /opt/sbom/bin/cyclonedx-py environment --output-reproducible --output-file /tmp/sbom.json /opt/venv/bin/python

FROM loadtest AS sbom-loadtest
COPY --from=sbom-tool /opt/sbom /opt/sbom
RUN /opt/sbom/bin/cyclonedx-py environment --output-reproducible --output-file /tmp/sbom.json /opt/venv/bin/python

# An empty environment that sees what was added to NVIDIA's image.
FROM sbom-tool AS sbom-server
COPY --from=sync-libraries /opt/sync/lib /opt/sync/lib
RUN python -m venv --without-pip /opt/empty \
    && PYTHONPATH=/opt/sync/lib /opt/sbom/bin/cyclonedx-py environment --output-reproducible --output-file /tmp/sbom.json \
      /opt/empty/bin/python

FROM scratch AS sbom
COPY --from=sbom-server /tmp/sbom.json /server.cdx.json
COPY --from=sbom-server-cpu /tmp/sbom.json /server-cpu.cdx.json
COPY --from=sbom-train /tmp/sbom.json /train.cdx.json
COPY --from=sbom-loadtest /tmp/sbom.json /loadtest.cdx.json

# ---------------------------------------------------------------------------------------------------------------------
# Production: NVIDIA's image with the arguments and the repository sync, and nothing else added. An init container runs
#   python3 -m tickserve.cli repo sync --source ... --into /models --public-key ...
# with the image's own Python; the libraries lie apart from those of the image. The entry point is the server itself, so that it is
# process 1 and gets SIGTERM; NVIDIA's start script, which prints a banner and sets up the CUDA compatibility libraries
# for drivers older than the image, is not run. What follows the image's name on the command line is added to these
# arguments, and the last value of an argument wins; but a second --model-repository is a repository more.
#   control mode none          a model changes with a rolling restart, never over the network
#   auto-complete off          a model is what its config.pbtxt says, or it does not load
#   strict readiness           ready means every model is ready
#   body limit 8 MiB           --http-max-input-size: not known to releases of 24.10 and before
#   keepalive 10 s / 3 s       a half-open connection is noticed within 13 s; engines may ping as often
#   connection age 5 min       engines reconnect, so that load spreads over new replicas
#   exit timeout 30 s          below the pod's grace period
FROM ${TRITON_IMAGE}:${TRITON_TAG}${TRITON_DIGEST:+@${TRITON_DIGEST}} AS server
ARG TRITON_IMAGE
ARG TRITON_TAG
ARG TRITON_DIGEST
LABEL org.opencontainers.image.title="tickserve-server" \
      org.opencontainers.image.description="NVIDIA Triton with the production arguments of Tickserve and its sync." \
      org.opencontainers.image.vendor="Tickserve contributors" \
      org.opencontainers.image.base.name="${TRITON_IMAGE}:${TRITON_TAG}" \
      org.opencontainers.image.base.digest="${TRITON_DIGEST}"
ENV PYTHONPATH=/opt/tickserve:/opt/sync/lib \
    PYTHONDONTWRITEBYTECODE=1
COPY LICENSE /licenses/tickserve/LICENSE
COPY --from=sync-libraries /opt/sync/lib /opt/sync/lib
COPY tickserve /opt/tickserve/tickserve
COPY export /opt/tickserve/export
USER 1000:1000
WORKDIR /tmp
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
  CMD ["curl", "--fail", "--silent", "--output", "/dev/null", "http://127.0.0.1:8000/v2/health/ready"]
ENTRYPOINT ["/opt/tritonserver/bin/tritonserver", \
  "--model-repository=/models", \
  "--model-control-mode=none", \
  "--disable-auto-complete-config", \
  "--strict-readiness=true", \
  "--exit-on-error=true", \
  "--exit-timeout-secs=30", \
  "--http-max-input-size=8388608", \
  "--grpc-keepalive-time=10000", \
  "--grpc-keepalive-timeout=3000", \
  "--grpc-keepalive-permit-without-calls=true", \
  "--grpc-http2-min-recv-ping-interval-without-data=5000", \
  "--grpc-http2-max-pings-without-data=0", \
  "--grpc-max-connection-age=300000", \
  "--grpc-max-connection-age-grace=10000", \
  "--log-format=ISO8601"]
CMD []
ARG SOURCE
ARG REVISION
ARG VERSION
LABEL org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.version="${VERSION}"
