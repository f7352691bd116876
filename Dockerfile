# syntax=docker/dockerfile:1
# The images of Tickserve, one target each:
#
#   docker build --target server     -t tickserve-server     .   NVIDIA Triton for production: GPU or CPU
#   docker build --target server-cpu -t tickserve-server-cpu .   the embedded Triton, for CI and sidecars, loopback only
#   docker build --target train      -t tickserve-train      .   the whole stack: data, training, export, load test
#
# Both servers read the model repository from /models: mount it, read-only. Without the mount they do not start.
# Pin a base by digest: --build-arg TRITON_DIGEST=sha256:... (PYTHON_DIGEST for the others). The defaults are empty, because
# a digest is read from your registry and never invented: without one, the tag decides what you get.

ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver
ARG TRITON_TAG=26.06-py3
ARG TRITON_DIGEST=
ARG PYTHON_IMAGE=docker.io/library/python
ARG PYTHON_TAG=3.11-slim-bookworm
ARG PYTHON_DIGEST=

# ---------------------------------------------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE}:${PYTHON_TAG}${PYTHON_DIGEST:+@${PYTHON_DIGEST}} AS python-base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/tickserve \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
LABEL org.opencontainers.image.vendor="Tickserve contributors" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN python -m venv /opt/venv
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
# container:<name>`, or `--network host`). Production is the target `server`.
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

# ---------------------------------------------------------------------------------------------------------------------
# TORCH_INDEX chooses PyTorch's wheels: its CPU and CUDA builds are different files of one version, so torch has no hash.
FROM python-base AS train
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
LABEL org.opencontainers.image.title="tickserve-train" \
      org.opencontainers.image.description="Tickserve with every stage: data, features, training, export, load test."
COPY requirements.lock /opt/
# DL3013 cannot see that TORCH carries its own version.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --no-deps --require-hashes -r /opt/requirements.lock \
    && pip install --no-cache-dir --index-url "${TORCH_INDEX}" "${TORCH}" \
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

# ---------------------------------------------------------------------------------------------------------------------
# Production: NVIDIA's image with nothing added but the arguments. The entry point is the server itself, so that it is
# process 1 and gets SIGTERM; NVIDIA's start script, which prints a banner and sets up the CUDA compatibility libraries
# for drivers older than the image, is not run. What follows the image's name on the command line is added to these
# arguments, and the last value of an argument wins.
#   control mode none          a model changes with a rolling restart, never over the network
#   auto-complete off          a model is what its config.pbtxt says, or it does not load
#   strict readiness           ready means every model is ready
#   body limit 8 MiB           --http-max-input-size: not known to releases of 24.10 and before
#   keepalive 10 s / 3 s       a half-open connection is noticed within 13 s; engines may ping as often
#   connection age 5 min       engines reconnect, so that load spreads over new replicas
#   exit timeout 30 s          below the pod's grace period
FROM ${TRITON_IMAGE}:${TRITON_TAG}${TRITON_DIGEST:+@${TRITON_DIGEST}} AS server
LABEL org.opencontainers.image.title="tickserve-server" \
      org.opencontainers.image.description="NVIDIA Triton with the production arguments of Tickserve." \
      org.opencontainers.image.vendor="Tickserve contributors"
COPY LICENSE /licenses/tickserve/LICENSE
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
