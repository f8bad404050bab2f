# The environment of container/run as an image: docker build -t fem_vi . && docker run -it fem_vi
FROM debian:trixie

COPY container /opt/source/container
COPY pyproject.toml /opt/source/
RUN apt-get update \
 && sed 's/#.*//' /opt/source/container/packages.txt | xargs env DEBIAN_FRONTEND=noninteractive \
    apt-get install --yes --no-install-recommends \
 && rm -rf /var/lib/apt/lists/*
RUN /opt/source/container/install-python /opt/fem_vi /opt/source/pyproject.toml

COPY . /opt/source
RUN /opt/fem_vi/bin/pip install --no-cache-dir --no-deps /opt/source

ENV PATH=/opt/fem_vi/bin:$PATH \
    PIP_CONSTRAINT=/opt/fem_vi/constraints.txt \
    OMP_NUM_THREADS=1 \
    OMPI_MCA_btl=self,sm \
    OMPI_ALLOW_RUN_AS_ROOT=1 \
    OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
    PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
WORKDIR /srv
CMD ["bash"]
