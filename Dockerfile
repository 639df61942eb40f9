# The day-file ETL: docker build -t data-engineer-challenge .
#   docker run -v $(pwd)/data:/app/data -v $(pwd)/output:/app/output data-engineer-challenge
# Another base: --build-arg BASE=debian:trixie-slim needs python3 and python3-venv in it.
ARG BASE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python3 -m venv /venv
# Versions change seldom, sources often: the large layer is made anew only with the former.
COPY deploy/container/requirements.txt /src/
RUN /venv/bin/pip install -q --no-deps -r /src/requirements.txt
COPY pyproject.toml README.md /src/
COPY kvstore /src/kvstore
# Tests and headers of libraries are a fifth of them, and nobody runs them here.
RUN /venv/bin/pip install -q --no-deps /src \
    && /venv/bin/pip check \
    && /venv/bin/pip uninstall -q -y pip \
    && find /venv \( -name tests -o -name __pycache__ -o -name include \) -type d -prune -exec rm -rf {} +

FROM ${BASE}
LABEL org.opencontainers.image.title="kvstore day files" \
      org.opencontainers.image.description="Raw exports to a 5-second grid: one Parquet file per hour, phase and module"
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 MPLCONFIGDIR=/tmp HOME=/tmp
COPY --from=build /venv /venv
WORKDIR /app
COPY solution.py deploy/container/entrypoint /app/
ENTRYPOINT ["/app/entrypoint"]
CMD ["python3", "solution.py", "--input", "data/", "--output", "output/"]
