# The command line with CUDA. It runs as any user: Triton and torch.compile keep their caches in HOME, and ask for a name.
FROM python:3.12-slim
# Triton builds the launchers of its kernels with a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/sagan_fast
COPY setup.py pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY sagan_fast sagan_fast
RUN pip install --no-cache-dir ".[export,hdf5,tfrecord,view]"
ENV HOME=/tmp USER=sagan
WORKDIR /work
ENTRYPOINT ["sagan-fast"]
CMD ["--help"]
