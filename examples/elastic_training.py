"""Train on scikit-learn's digits with DDP on nodes that come and go, and train on every sample once in an epoch.

    ft_launcher --nnodes 1:4 --nproc-per-node 1 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \\
        --ft-cfg-path configs/ft.yaml examples/elastic_training.py

Start it on one node and, whenever you like, on others; stop some of them. Each time all ranks go on from the last
checkpoint. It says how far all of them together had come in the epoch, so any number of ranks can share the rest. A
step is one batch of the same size over all ranks, however many they are.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler, TensorDataset

import ft_launcher
from ft_launcher.checkpoint import CheckpointManager, ResumableSampler

BATCH = 120  # samples of one step over all ranks
TRAINED = 1440  # samples of an epoch, 12 whole batches; the other 357 are for the loss at the end


@record  # writes the traceback where the launcher's summary finds it
def main() -> None:
    options = parse_options()
    client = ft_launcher.connect()
    with client.section("setup"):
        device = join_process_group(client)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        digits = load_digits()
        images = torch.tensor(digits.data / 16, dtype=torch.float32, device=device)
        labels = torch.tensor(digits.target, device=device)
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        model = DistributedDataParallel(network.to(device))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sampler = ResumableSampler(TRAINED, rank=rank, world_size=world_size, drop_last=False)
        manager = CheckpointManager(options.checkpoint_dir, save_interval=options.checkpoint_every, client=client)
        restored = manager.load_latest(model, optimizer, sampler=sampler)
        step = 0 if restored is None else restored.step
    say(f"from step {step} on with {world_size} ranks")

    dataset = TensorDataset(images[:TRAINED], labels[:TRAINED], torch.arange(TRAINED))
    while step < options.steps:
        # A generator of its own: else each new loader draws from the one that a model's dropout draws from.
        loader = DataLoader(dataset, batch_sampler=Shares(sampler, rank, world_size), generator=torch.Generator())
        for image, label, index in loader:
            with client.section("step"):
                optimizer.zero_grad()
                # DDP averages over ranks. The mean over the whole batch comes of it also where shares differ by one.
                loss = cross_entropy(model(image), label, reduction="sum") * world_size / BATCH
                loss.backward()
                optimizer.step()
                time.sleep(options.step_time)
            step += 1
            sampler.advance(BATCH)
            if options.record is not None:
                write_down(options.record, step, index)
            is_preempted = client.should_checkpoint(step)  # this machine, or another one, will be taken away
            with client.section("checkpointing"):
                save = manager.save if is_preempted or step == options.steps else manager.maybe_save
                save(model, optimizer, step, {"loss": loss.item()}, sampler=sampler)
            if is_preempted:
                manager.close()
                dist.destroy_process_group()
                client.exit_for_preemption()
            if step % 5 == 0:
                say(f"step {step} loss {loss.item():.6f}")
            if step == options.steps:
                break
        else:
            sampler.next_epoch()

    with torch.no_grad():
        loss = cross_entropy(model.module(images[TRAINED:]), labels[TRAINED:])
    say(f"finished step {step} loss {loss.item():.6f}")
    manager.close()
    dist.destroy_process_group()
    client.shutdown_workload_monitoring()


class Shares(Sampler[list[int]]):
    """This rank's share of each batch, in which the ranks take turns."""

    def __init__(self, sampler: ResumableSampler, rank: int, world_size: int) -> None:
        self._sampler, self._rank, self._world_size = sampler, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        # The n-th sample of this rank is, of all that are left in the epoch, the one at n * world_size + rank.
        places = enumerate(self._sampler)
        for _, share in groupby(places, lambda place: (place[0] * self._world_size + self._rank) // BATCH):
            yield [index for _, index in share]


def write_down(directory: Path, step: int, index: torch.Tensor) -> None:
    """Add to the file of this process which samples it has trained on."""
    directory.mkdir(parents=True, exist_ok=True)
    name = f"cycle-{os.environ.get('FT_CYCLE', '0')}-rank-{dist.get_rank()}"
    with (directory / name).open("a", encoding="ascii") as file:
        file.write(f"{step}: {' '.join(map(str, index.tolist()))}\n")


def join_process_group(client: ft_launcher.RankMonitorClient) -> torch.device:
    """Join the other ranks: over NCCL when each rank of the node has a GPU of its own, else over gloo."""
    timeout = client.process_group_timeout()  # so that a hang is found by the monitor, and named, before it is theirs
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=timeout)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=timeout)
    return device


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"{text}\n", end="", flush=True)  # in one piece: what the launcher says may come between


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="steps in all, resumed ones included (120)")
    parser.add_argument("--step-time", type=float, default=0.0, metavar="S", help="seconds added to each step (0)")
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("runs/elastic"), help="(runs/elastic)")
    parser.add_argument("--checkpoint-every", type=int, default=10, metavar="N", help="steps (10)")
    parser.add_argument("--record", type=Path, metavar="DIR", help="write down which samples each step has seen")
    return parser.parse_args()


if __name__ == "__main__":
    code = 0
    try:
        main()
    except SystemExit as end:  # a notice of preemption
        code = end.code
    sys.stdout.flush()
    os._exit(code)  # not by Python's own end, which gloo's threads may abort: see train_ddp.py
