# FlashCore for a machine with an NVIDIA GPU, a driver for CUDA 13 and the NVIDIA container toolkit:
#   docker build -t flashcore .
#   docker run --rm --gpus all flashcore                # flashcore info
#   docker run --rm --gpus all flashcore validate
#
# Python's own image, not one of CUDA's: torch brings CUDA's libraries, Triton its assembler, and the toolkit mounts the
# host's driver. This one has what remains, Python's headers, which the slim images of the distributions leave out.
FROM python:3.12-slim-trixie

# Triton and FlashCore's launch path compile C at the first call (gcc), torch.compile and calls with gradients C++ (g++).
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*

# What images of CUDA set: which GPUs, and compute and nvidia-smi of the driver.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# The pair that results/ was measured with.
ARG TORCH=2.11.0
ARG TRITON=3.6.0
RUN pip install --no-cache-dir torch==${TORCH} triton==${TRITON}

WORKDIR /opt/flashcore
COPY pyproject.toml README.md LICENSE ./
COPY flashcore flashcore
RUN pip install --no-cache-dir '.[bench]'

RUN useradd --create-home flashcore
USER flashcore
WORKDIR /home/flashcore
# The validation's smallest shape, compiled for an H100 without one, so that no first call waits for it.
RUN python -c "import flashcore; from flashcore.core.target import H100; flashcore.warmup([(8, 8, 128, 64)], target=H100)"

ENTRYPOINT ["flashcore"]
CMD ["info"]
