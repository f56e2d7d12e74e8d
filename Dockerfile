# One image for every service and the gateway.
#   docker build -t gesso .                                  CPU
#   docker build -t gesso:cuda --build-arg VARIANT=cuda .    CUDA
ARG VARIANT=cpu
FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM base AS torch-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir "torch==2.13.0" --index-url "${TORCH_INDEX}"

FROM base AS torch-cuda
RUN pip install --no-cache-dir "torch==2.13.0"

# hadolint ignore=DL3006
FROM torch-${VARIANT} AS final
WORKDIR /opt/gesso
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY contracts contracts
COPY kernels kernels
COPY core core
COPY services services
# The reader of words asks for the OpenCV that opens windows, whose libraries a slim image lacks; the
# one without windows takes its place.
RUN pip install --no-cache-dir "/opt/gesso[ocr]" \
    && pip uninstall --yes opencv-python \
    && pip install --no-cache-dir "opencv-python-headless==5.0.0.93" \
    && useradd --create-home --uid 10001 gesso
USER 10001
ENTRYPOINT ["gesso"]
CMD ["--help"]
