"""A Ray of one test module: it is gone afterwards, with its files."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def local_ray(num_cpus: int = 4) -> Iterator[None]:
    import ray

    # Short: the paths of Ray's sockets are below it.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as directory, pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_TMPDIR", directory)
        ray.init("local", num_cpus=num_cpus, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
