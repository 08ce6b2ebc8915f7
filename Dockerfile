# An image for CPUs. It has not been built by us yet.
#   docker build --build-arg PIP_INDEX_URL=YOUR_INDEX -t mapo-lightning .
FROM python:3.11-slim-bookworm

# Where pip looks for packages; empty: its own default. An index of CPU builds of torch keeps the image small.
ARG PIP_INDEX_URL=""

# What rendering without a display needs: the same packages as in the Makefile.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libegl1 libgl1 libgl1-mesa-dri \
    && rm -rf /var/lib/apt/lists/*

COPY . /opt/mapo
# As in the Makefile: all but torch by its hash where the hashes are known. That set holds the tools of
# the tests too, so that the tests can run in the image.
RUN if [ -z "$PIP_INDEX_URL" ]; then unset PIP_INDEX_URL; fi \
    && if [ "$(uname -m)" = x86_64 ]; then \
        pip install --no-cache-dir --require-hashes --no-deps --only-binary :all: \
            -r /opt/mapo/requirements.lock; \
    fi \
    && pip install --no-cache-dir -c /opt/mapo/constraints.txt /opt/mapo

RUN useradd --create-home mapo
USER mapo
WORKDIR /home/mapo
ENTRYPOINT ["mapo-train"]
CMD ["--help"]
