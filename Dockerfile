# launch.py in a container; docs/docker.md says how to use it.
#
#   docker build -t fourdfy .                                                       for CPUs
#   docker build -t fourdfy --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 .  for NVIDIA GPUs
ARG BASE=ubuntu:24.04
FROM ${BASE}
ARG BASE

# Triton compiles with gcc and Python's headers.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /fourdfy
ENV PATH=/venv/bin:$PATH
COPY requirements.lock requirements-cuda.lock ./
RUN python3 -m venv /venv \
    && pip install --no-cache-dir --no-deps --require-hashes -r requirements.lock \
    && case "$BASE" in \
        *cuda*) pip install --no-cache-dir --no-deps --require-hashes -r requirements-cuda.lock ;; \
        *) pip install --no-cache-dir "$(grep -o '^torch==[0-9.]*' requirements-cuda.lock)" \
            --index-url https://download.pytorch.org/whl/cpu ;; \
    esac
COPY LICENSE README.md launch.py pyproject.toml setup.py ./
COPY configs configs
COPY fourdfy fourdfy
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e .

RUN useradd --create-home --uid 10001 user \
    && mkdir -p outputs /home/user/.cache \
    && chown user: outputs /home/user/.cache \
    && chmod a+rx /home/user
# For "docker run --user" with somebody else's number, too.
ENV HOME=/home/user USER=user
USER 10001
VOLUME ["/fourdfy/outputs", "/home/user/.cache"]
ENTRYPOINT ["python", "launch.py"]
CMD ["--help"]
