# The service in a container; see docs/deploy.md.
#
#     docker build -t sseapp .
#     docker run -p 127.0.0.1:8000:8000 -v sseapp:/data -e SSEAPP_AUTH=off sseapp
#
# BASE is any Debian-like image with Python 3.11 to 3.15 and its venv module. Pin it by digest for reproducible builds:
#     --build-arg BASE=python:3.13.9-slim-bookworm@sha256:…
# To use another package index: --secret id=pip.conf,src=pip.conf (nothing of the file stays in the image).
ARG BASE=python:3.13.9-slim-bookworm

FROM ${BASE} AS build
RUN python3 -m venv /pip && python3 -m venv --without-pip /srv/venv
COPY requirements.txt /srv/
# Wheels only, so that nothing is compiled and no package's code runs during the build.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /pip/bin/python -m pip --python /srv/venv/bin/python install --no-cache-dir --disable-pip-version-check \
        --require-hashes --no-deps --only-binary :all: -r /srv/requirements.txt
COPY sseapp.py /srv/sseapp/
COPY ssecore /srv/sseapp/ssecore
COPY handlers /srv/sseapp/handlers
COPY docs /srv/sseapp/docs
# Compile now: at run time the file system may be read-only.
RUN /srv/venv/bin/python -m compileall -q /srv/sseapp && mkdir /srv/data

FROM ${BASE}
ARG BASE
LABEL org.opencontainers.image.title="sseapp" \
    org.opencontainers.image.description="A streaming server for Server-Sent Events" \
    org.opencontainers.image.version="0.2.0" \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.base.name="${BASE}"
COPY --from=build /srv/venv /srv/venv
COPY --from=build /srv/sseapp /srv/sseapp
# A new volume that is mounted here gets this owner.
COPY --from=build --chown=10001:10001 /srv/data /data
# TMPDIR: large uploads are spooled there. It must be a disk; a tmpfs would use memory.
ENV PATH=/srv/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TMPDIR=/data \
    SSEAPP_HOST=0.0.0.0 \
    SSEAPP_PORT=8000 \
    SSEAPP_DATA_DIR=/data
WORKDIR /srv/sseapp
# A number, because Kubernetes' runAsNonRoot can't check a name.
USER 10001:10001
EXPOSE 8000
# SIGTERM drains. SSEAPP_DRAIN_S (8) must be below the time until SIGKILL (`docker stop` gives 10 s).
STOPSIGNAL SIGTERM
# Checks that the process answers, not that it accepts work: a draining container is healthy. Host and port come from
# the same variables as the service's; the kernel maps 0.0.0.0 and :: to this machine.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 CMD ["python", "-c", "\
import sys; from http.client import HTTPConnection; from ssecore.settings import Settings; \
settings = Settings.from_env(); health = HTTPConnection(settings.host, settings.port, timeout=2); \
health.request('GET', '/healthz'); sys.exit(health.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "sseapp"]
CMD ["serve"]
