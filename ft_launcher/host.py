"""The launcher that runs the store of the job, and the leader with it: they live and die together."""

import gc
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError

from ft_launcher.addresses import LOOPBACK, is_loopback
from ft_launcher.exchange import Keys, Leader, append, fill_gap, gather, lead, perform
from ft_launcher.formation import Settings
from ft_launcher.lifeline import Beats
from ft_launcher.lifeline_server import LifelineServer
from ft_launcher.link import connect_store
from ft_launcher.placing import numbered_by
from ft_launcher.records import Announcement, Lost, Memory, Node, encode
from ft_launcher.rounds import Job
from ft_launcher.seal import Seal

__all__ = ["ANNOUNCEMENT", "Host", "announcement_seal"]

logger = logging.getLogger(__name__)

ANNOUNCEMENT = "ft_launcher/announcement"
"""The one key of the store whose name does not depend on the job: it says which job's store this is."""

PLACEMENT_LINES = 16
"""More nodes than these are left out of the printed placement; the file has them all."""


def announcement_seal(token: bytes | None) -> Seal:
    """Give the seal of announcements: one that a node of another job can check, to say that it is another job."""
    return Seal(token or b"ft_launcher announcement")


class Host:
    """The store, the lifeline server, and the leader on a thread of its own."""

    def __init__(
        self,
        listener: socket.socket,
        run_id: str,
        node: Node,
        settings: Settings,
        keys_of: Callable[[str], Keys],
        seal: Seal,
        token: bytes | None,
        beats: Beats,
        memory: Memory | None,
        placement_path: str,
    ) -> None:
        """`listener` is bound and listening at the endpoint; the store takes it over."""
        self._node, self._run_id = node, run_id
        self._announcement_seal = announcement_seal(token)
        self.incarnation = uuid.uuid4().hex
        self.keys = keys_of(self.incarnation)
        self._placement_path = placement_path
        address, self.port = listener.getsockname()[:2]
        is_wildcard = address in ("0.0.0.0", "::")  # noqa: S104 (compared, not bound)
        self.address: str = ("::1" if ":" in address else LOOPBACK) if is_wildcard else address
        self._store = TCPStore(
            self.address,
            self.port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),
            timeout=timedelta(seconds=60),
        )
        listener.close()
        self._reports = connect_store(self.address, self.port)
        self._gatherer = connect_store(self.address, self.port)
        self._gatherings: SimpleQueue[tuple[int, list[str]] | None] = SimpleQueue()
        self._seal = seal
        self._leader = Leader(Job(settings, node, time.monotonic(), memory))
        self._leader.job.address_of = self._address_of
        self._told_round = self._leader.job.memory.round
        self._is_closing = False
        self._is_rebuilt = memory is not None
        self.is_finished = threading.Event()
        self.has_given_up = False
        self.lifelines = LifelineServer("" if is_wildcard else address, beats, seal, self._report)
        self._announce()
        # A full garbage collection looks through all of torch, and the leader would answer nobody for 0.3 s.
        gc.collect()
        gc.freeze()
        threading.Thread(target=self._gather, name="ft_launcher gatherer", daemon=True).start()
        self._thread = threading.Thread(target=self._lead, name="ft_launcher leader", daemon=True)
        self._thread.start()

    @property
    def has_formed(self) -> bool:
        """A round has formed here, so that other hosts of this job give way."""
        return self._leader.job.memory.round >= 0 and not self._leader.job.rebuilt

    @property
    def is_over(self) -> bool:
        """The job has ended; some nodes may still be about to leave."""
        return self._leader.job.outcome is not None

    def close(self, wait: float) -> None:
        """Wait up to `wait` seconds for the other nodes to leave, and end. The host leaves last."""
        self.is_finished.wait(wait)
        if not self.is_finished.is_set():
            self._is_closing = True
            perform(fill_gap(self.keys, self._leader.next_slot), self._reports, time.monotonic)
            self._thread.join(5.0)
        self.lifelines.close()
        del self._store, self._reports

    def _address_of(self, node: Node) -> str:
        """Give the node's address for others; one on this machine may know it only by a name that is loopback here."""
        if is_loopback(node.address):
            return self.lifelines.address_seen() or node.address
        return node.address

    # -- on other threads -----------------------------------------------------------------------------------------

    def _report(self, node_id: str, how: str) -> None:
        words = {"closed": "its launcher died", "silent": "nothing was heard of it"}
        try:
            perform(append(self.keys, self._seal, Lost(node_id, words.get(how, how))), self._reports, time.monotonic)
            # It may have died with a place in the log taken and not filled, for which the leader waits.
            perform(fill_gap(self.keys, self._leader.next_slot), self._reports, time.monotonic)
        except (DistError, AttributeError):  # closed meanwhile
            pass

    def _lead(self) -> None:
        try:
            steps = lead(self.keys, self._seal, self._leader, self._after, lambda *round_: self._gatherings.put(round_))
            perform(steps, self._store, time.monotonic)
        except DistError:
            pass  # closed
        except Exception:
            logger.exception("internal error of the leader; the job cannot go on under this host")
            self.has_given_up = True
        self._gatherings.put(None)
        self.is_finished.set()
        if self.has_given_up:
            self.lifelines.close()

    def _gather(self) -> None:
        """Wait for the nodes that the leader has stopped: one connection can wait for them all, or for the log."""
        with suppress(DistError):  # closed
            while (stopped := self._gatherings.get()) is not None:
                perform(gather(self.keys, self._seal, *stopped), self._gatherer, time.monotonic)

    def _after(self, job: Job) -> bool:
        for warning in job.warnings:
            logger.warning(warning)
        job.warnings.clear()
        if self._leader.forged:
            logger.warning(
                "%d records in the store were not written by a node of this job; ignored", self._leader.forged
            )
            self._leader.forged = 0
        if job.memory.round != self._told_round and job.placement.places:
            self._told_round = job.memory.round
            self._tell_placement(job)
            self._announce()
        if job.is_lost:
            logger.error(
                "most nodes of the last round are out of reach, and may go on elsewhere: giving up as the host"
            )
            self.has_given_up = True
        return self._is_closing or self.has_given_up or (job.outcome is not None and job.is_empty)

    def _announce(self) -> None:
        job = self._leader.job
        announcement = Announcement(
            run_id=self._run_id,
            incarnation=self.incarnation,
            name=self._node.name,
            pid=self._node.pid,
            lifeline_port=self.lifelines.port,
            epoch=job.memory.epoch + job.rebuilt,
            round=job.memory.round if self.has_formed else -1,
        )
        value = self._announcement_seal.seal(ANNOUNCEMENT, encode(announcement))
        self._reports.set(ANNOUNCEMENT, value)  # type: ignore[arg-type]  # torch takes bytes too

    def _tell_placement(self, job: Job) -> None:
        lines = []
        for placed in job.placement.places[:PLACEMENT_LINES]:
            last = placed.rank + placed.node.local_world_size - 1
            those = f"rank {placed.rank}" if last == placed.rank else f"ranks {placed.rank}-{last}"
            lines.append(f"{placed.group_rank} {placed.node.name} ({those})")
        more = len(job.placement.places) - PLACEMENT_LINES
        ending = f", and {more} more" if more > 0 else ""
        by = numbered_by(job.placement, by_infrastructure=job.settings.by_infrastructure)
        logger.info("placement of round %d, %s: %s%s", job.memory.round, by, ", ".join(lines), ending)
        if not self._placement_path:
            return
        placement = {
            "run_id": self._run_id,
            "round": job.memory.round,
            "numbered_by": by,
            "nodes": [
                {
                    "group_rank": each.group_rank,
                    "name": each.node.name,
                    "address": each.node.address,
                    "pid": each.node.pid,
                    "ranks": list(range(each.rank, each.rank + each.node.local_world_size)),
                }
                for each in job.placement.places
            ],
        }
        path = Path(self._placement_path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f".{path.name}.{os.getpid()}")
            new.write_text(json.dumps(placement, indent=1) + "\n", encoding="utf-8")
            new.replace(path)
        except OSError as error:
            logger.warning("%s: cannot write the placement: %s", path, error.strerror)
