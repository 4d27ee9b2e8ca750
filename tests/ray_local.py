"""A Ray of one test module: it is gone afterwards, with its files."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def local_ray(num_cpus: int = 4) -> Iterator[None]:
    import logging

    import ray

    # Short: the paths of Ray's sockets are below it.
    directory = tempfile.mkdtemp(prefix="r", dir="/tmp")
    ray.init(
        "local",
        num_cpus=num_cpus,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        _temp_dir=directory,
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(directory)
