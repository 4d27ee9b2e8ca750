"""What a restart costs under Ray, each against Ray's own means in the same run.

A gang: from the SIGKILL of a member to the moment in which all are set up and restored again, against the creation of
the same actors with Ray alone. One actor: from its SIGKILL to the answer of the call that it was running, against an
actor with Ray's max_restarts and max_task_retries (which is not initialised when the call comes).
"""

import argparse
import logging
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ft_launcher.integrations.ray_actors import (
    ActorGang,
    GangRestartedError,
    RayFaultToleranceConfig,
    SupervisedActor,
    torch_process_group,
)

UNLIMITED = RayFaultToleranceConfig(max_restarts=-1, max_task_retries=-1)


class Member:
    """Imports torch, meets the others in gloo, and is restored from a state of 64 MB."""

    def __init__(self, path: str) -> None:
        import torch

        self.torch, self.path = torch, path
        self.state: Any = None

    def address(self) -> tuple[str, int]:
        import socket

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def join(self, host: str, port: int, rank: int, size: int) -> None:
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
        import torch.distributed as dist

        dist.init_process_group("gloo")

    def restore(self) -> int:
        self.state = self.torch.load(self.path, weights_only=True)
        return 7

    def pid(self) -> int:
        return os.getpid()


class Sleeper:
    def __init__(self, path: str) -> None:
        self.path = path

    def pid(self) -> int:
        return os.getpid()

    def work(self) -> int:
        """Never ends in the process that it finds written down."""
        with open(self.path) as file:  # noqa: PTH123
            first = int(file.read())
        if first == os.getpid():
            time.sleep(3600)
        return os.getpid()


def create_with_ray(path: str, size: int) -> float:
    group = placement_group([{"CPU": 1}] * size)
    since = time.monotonic()
    actor: Any = ray.remote(Member)
    members = [
        actor.options(num_cpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank)).remote(path)
        for rank in range(size)
    ]
    host, port = ray.get(members[0].address.remote())
    ray.get([member.join.remote(host, port, rank, size) for rank, member in enumerate(members)])
    ray.get([member.restore.remote() for member in members])
    took = time.monotonic() - since
    for member in members:
        ray.kill(member)
    remove_placement_group(group)
    return took


def restart_gang(gang: ActorGang) -> float:
    pid = gang.pids[-1]
    since = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    try:
        gang.call("pid")
    except GangRestartedError:
        return time.monotonic() - since
    raise RuntimeError("the gang was not restarted")


def restore(member: Member) -> int:
    return member.restore()


def one_actor(path: str, call: Callable[[str], Any], wait: Callable[[Any], Any]) -> float:
    pid = wait(call("pid"))
    with open(path, "w") as file:  # noqa: PTH123
        file.write(str(pid))
    answer = call("work")
    time.sleep(0.2)  # it runs
    since = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert wait(answer) != pid
    return time.monotonic() - since


def say(name: str, ours: list[float], theirs: list[float], limit: float | None = None) -> bool:
    ratio = statistics.median(ours) / statistics.median(theirs)
    spans = [f"{statistics.median(each):.2f} s ({min(each):.2f} to {max(each):.2f})" for each in (ours, theirs)]
    bound = "" if limit is None else f", limit {limit:g}"
    sys.stdout.write(f"{name}: {spans[0]}, Ray's own {spans[1]}: {ratio:.2f} times{bound}\n")
    sys.stdout.flush()
    return limit is None or ratio <= limit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=6, help="samples of each (%(default)s)")
    parser.add_argument("--size", type=int, default=2, help="members of the gang (%(default)s)")
    options = parser.parse_args()
    logging.getLogger("ft_launcher").setLevel(logging.CRITICAL)
    directory = os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="r", dir="/tmp")
    ray.init(
        "local",
        num_cpus=2 * options.size + 2,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    try:
        import torch

        path = f"{directory}/state.pt"
        torch.save({"weight": torch.zeros(16 << 20)}, path)
        create_with_ray(path, options.size)  # the first one finds nothing in the page cache
        bare, ours = [], []
        with ActorGang(
            Member, options.size, (path,), config=UNLIMITED, setup=torch_process_group(), restore=restore
        ) as gang:
            gang.ready()
            for _ in range(options.n):
                bare.append(create_with_ray(path, options.size))
                ours.append(restart_gang(gang))
        is_well = say("gang, restart against creation", ours, bare, 1.5)
        mine, rays = [], []
        remote: Any = ray.remote
        note = f"{directory}/pid"
        with SupervisedActor(Sleeper, (note,), config=UNLIMITED, poison_after=None) as actor:
            handle = remote(max_restarts=-1, max_task_retries=-1)(Sleeper).remote(note)
            for _ in range(options.n):
                mine.append(one_actor(note, actor.submit, lambda answer: answer.result()))
                rays.append(one_actor(note, lambda method: getattr(handle, method).remote(), ray.get))
        say("one actor, death to answer", mine, rays)
        return 0 if is_well else 1
    finally:
        ray.shutdown()
        shutil.rmtree(directory)


if __name__ == "__main__":
    sys.exit(main())
