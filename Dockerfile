# Explains the scenes of the demo and keeps the pictures: docker build -t pyfast-xai . && docker run -v $PWD/out:/out pyfast-xai
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir "torch==2.13.0" numpy "scikit-build-core>=1.0.3" "cmake>=3.26" ninja
COPY . .
RUN /venv/bin/pip install --no-cache-dir --no-build-isolation ".[demo]"

FROM python:3.12-slim
COPY --from=build /venv /venv
# Not as root: the demo writes to /out alone.
RUN useradd --create-home explainer && mkdir /out && chown explainer /out
USER explainer
ENTRYPOINT ["/venv/bin/pyfast-xai"]
CMD ["demo", "--out", "/out/demo"]
