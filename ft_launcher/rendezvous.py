"""The rendezvous of several nodes, behind torch's interface: who takes part, with which rank, and what to do now."""

import logging
import os
import select
import socket
import time
import uuid
from collections.abc import Mapping

import msgspec
import torch
from msgspec import Struct
from torch._C._distributed_c10d import HashStore
from torch.distributed.elastic.rendezvous.api import (
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from ft_launcher import ranks, torch_flags
from ft_launcher.addresses import LOOPBACK, is_loopback, listen, names_loopback
from ft_launcher.causes import Cause, HostLost, Preempted
from ft_launcher.errors import UsageError
from ft_launcher.formation import Settings, Timing
from ft_launcher.job_rendezvous import (
    BOUNDED_RESOLVER,
    Directive,
    ForeignRendezvous,
    JobRendezvous,
    LoneNodeRendezvous,
    seconds_until,
)
from ft_launcher.lifeline import Beats
from ft_launcher.link import HostGone
from ft_launcher.meeting import ADVICE, Attended, Meeting, NobodyThereError, parse_endpoints
from ft_launcher.policy import NodeState
from ft_launcher.records import (
    Assigned,
    End,
    Held,
    Joined,
    Leave,
    Left,
    Memory,
    Message,
    Node,
    Noticed,
    Prepare,
    Ready,
    Reason,
    Reported,
    Requested,
    SaveAt,
    Saved,
    Stop,
    Terms,
    Waiting,
)
from ft_launcher.worker_store import WorkerStore

__all__ = ["JobTerms", "NodesRendezvous", "open_rendezvous"]

logger = logging.getLogger(__name__)

LOOK_AROUND_SECONDS = 2.0
"""How often a host at which no round has formed yet looks whether the others meet elsewhere."""

GOODBYE_SECONDS = 5.0
"""How long the host stays for the others when the job is over, or when it was told to end."""

KNOWN_KEYS = {
    *("last_call_timeout", "join_timeout", "min_uptime", "failover_timeout", "keep_alive_interval"),
    *("keep_alive_max_attempt", "is_host", "joins_only", "upscaling_enabled"),
    # torchrun's and nvidia-resiliency-ext's, for which there is no use here
    *("timeout", "rank", "close_timeout", "read_timeout", "heartbeat_timeout", "store_type", "use_libuv"),
    *("store_connect_wait_seconds", "replacement_group_size"),
}

LOST_WORDS = {
    "closed": "its launcher died",
    "silent": "it was silent for too long",
    "evicted": "it had given this node up",
    "refused": "it refused this node",
    "forged": "somebody else writes in its store",
}


class JobTerms(Struct, frozen=True, kw_only=True):
    """What decides about nodes and is not in torch's RendezvousParameters."""

    local_world_size: int
    role: str = "default"
    restart_policy: str = "any-failed"
    max_restarts: int = 0
    suspect_after: int | None = 3
    use_infra_group_rank: bool = True
    token: bytes | None = None
    placement_path: str = ""


def open_rendezvous(
    parameters: RendezvousParameters, terms: JobTerms, environ: Mapping[str, str], node_rank: int | None = None
) -> JobRendezvous:
    """Give the handler for `parameters`: of a node alone, of several nodes, or torch's. `node_rank`: with `static`.

    Raises UsageError, and what torch raises for a backend of its own.
    """
    backend, static = parameters.backend, parameters.backend == "static"
    node = _node(parameters, terms, environ, node_rank if static else None)
    if static or backend == "c10d":
        endpoints = parse_endpoints(parameters.endpoint)
        if parameters.max_nodes == 1 and (static or endpoints[0].port == 0):
            host = parameters.local_addr or (endpoints[0].host if static else LOOPBACK)
            settings = Settings(node.terms, suspect_after=terms.suspect_after)
            return LoneNodeRendezvous(parameters.run_id, backend, node, settings, host, endpoints[0].port * static)
        if endpoints[0].port == 0:
            raise UsageError(f"--rdzv-endpoint {parameters.endpoint}: several nodes need a port that they all know")
        return _of_nodes(parameters, terms, environ, node, static=static)
    host, _ = parse_rendezvous_endpoint(parameters.endpoint, default_port=0)
    inner: RendezvousHandler = get_rendezvous_handler(parameters)
    alone = msgspec.structs.replace(node.terms, min_nodes=1, max_nodes=1)
    return ForeignRendezvous(inner, node, Settings(alone, suspect_after=terms.suspect_after), parameters.local_addr)


def _node(parameters: RendezvousParameters, terms: JobTerms, environ: Mapping[str, str], node_rank: int | None) -> Node:
    most = parameters.max_nodes
    number = (node_rank, "--node-rank") if node_rank is not None else ranks.infra_rank(environ)
    if not terms.use_infra_group_rank and node_rank is None:
        number = None
    return Node(
        id=uuid.uuid4().hex,
        name=environ.get("SLURMD_NODENAME") or socket.gethostname(),
        address="",
        pid=os.getpid(),
        local_world_size=terms.local_world_size,
        role=terms.role,
        terms=Terms(
            min_nodes=parameters.min_nodes,
            max_nodes=most,
            restart_policy=terms.restart_policy,
            max_restarts=terms.max_restarts,
            torch=".".join(torch.__version__.split(".")[:2]),
        ),
        infra_rank=number[0] if number else None,
        infra_source=number[1] if number else "",
        highest_rank=ranks.highest_rank(environ, number[1], most) if number else 0,
    )


def _of_nodes(
    parameters: RendezvousParameters, terms: JobTerms, environ: Mapping[str, str], node: Node, *, static: bool
) -> "NodesRendezvous":
    endpoints = parse_endpoints(parameters.endpoint)

    for key in sorted(parameters.config.keys() - KNOWN_KEYS):
        near = torch_flags.nearest(key, sorted(KNOWN_KEYS))
        logger.warning("--rdzv-conf %s: has no effect%s", key, f"; did you mean {near}?" if near else "")

    def seconds(key: str, default: float) -> float:
        text = parameters.get(key, default)
        try:
            value = float(text)
        except (TypeError, ValueError):
            value = -1.0
        if not 0 <= value < 1e9:
            raise UsageError(f"--rdzv-conf {key}={text}: must be a number of seconds, 0 or more")
        return value

    interval = seconds("keep_alive_interval", 1.0)
    attempts = seconds("keep_alive_max_attempt", 5)
    if interval <= 0 or attempts < 2:
        raise UsageError("--rdzv-conf: keep_alive_interval must be more than 0, and keep_alive_max_attempt 2 or more")
    timing = Timing(
        last_call_timeout=seconds("last_call_timeout", Timing().last_call_timeout),
        join_timeout=seconds("join_timeout", Timing().join_timeout),
        min_uptime=seconds("min_uptime", Timing().min_uptime),
        failover_timeout=seconds("failover_timeout", Timing().failover_timeout),
        # The old host gives up one interval after the others did, and then kills its workers.
        settle=interval + 1.0,
    )
    expected = environ.get("SLURM_NTASKS", "")
    settings = Settings(
        terms=node.terms,
        timing=timing,
        by_infrastructure=terms.use_infra_group_rank or static,
        upscaling=parameters.get_as_bool("upscaling_enabled", True) is not False,
        expected=min(int(expected), parameters.max_nodes) if expected.isdigit() and int(expected) > 1 else None,
        endpoints=len(endpoints),
        suspect_after=terms.suspect_after,
    )
    is_host = parameters.get_as_bool("is_host")
    if static and is_host is None:
        is_host = node.infra_rank == 0
    # Torch looks up the name of whoever connects to a store, one after the other: with a bad resolver at most 1 s each.
    if parameters.max_nodes > 1:
        os.environ.setdefault("RES_OPTIONS", BOUNDED_RESOLVER)
    handler = NodesRendezvous(parameters.run_id, parameters.backend)
    handler.meeting = Meeting(
        parameters.run_id,
        endpoints,
        _with_address(node, parameters.local_addr),
        settings,
        Beats(interval=interval, limit=interval * attempts),
        token=terms.token,
        is_host=is_host,
        joins_only=parameters.get_as_bool("joins_only") is True,
        placement_path=terms.placement_path,
        # The launcher sees at the same moment that its host is lost, and stops them itself unless it is frozen.
        on_lease=lambda until: handler.on_lease(until + interval / 4),
    )
    return handler


def _with_address(node: Node, local_addr: str | None) -> Node:
    if not local_addr:
        return node
    try:
        found = socket.getaddrinfo(local_addr, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"--local-addr {local_addr}: {error.strerror}") from None
    return msgspec.structs.replace(node, address=str(found[0][4][0]))


def _where_to_listen(attended: Attended) -> str:
    """The node's address; all of them ("") where it knows itself by a loopback address that means it only here."""
    address = attended.node.address
    # The leader tells the workers the address that the others see (Host._address_of).
    return "" if is_loopback(address) and not names_loopback(attended.where.host) else address


class NodesRendezvous(JobRendezvous):
    """The nodes of a job, wherever its leader is."""

    meeting: Meeting

    def __init__(self, run_id: str, backend: str) -> None:
        super().__init__(run_id, backend)
        self._attended: Attended | None = None
        self._memory: Memory | None = None
        self._group_rank: int | None = None
        self._lost: int | None = None
        self._store: WorkerStore | None = None
        self._unheeded: list[Message | HostGone] = []
        self._notices: dict[str, float | None] = {}  # that came to this node and are not over, with their ends

    # -- torch's interface ----------------------------------------------------------------------------------------

    def next_rendezvous(self) -> RendezvousInfo:
        """Take part in the next round, or wait for a place in one.

        Raises RendezvousGracefulExitError when the job, or this node's part in it, ends first; `directive` says why.
        """
        self._store = None
        while True:
            attended = self._attended or self._attend()
            with listen(_where_to_listen(attended), 0) as listener:
                assigned = self._await_place(attended, listener.getsockname()[1])
                if assigned is not None:
                    return self._enter(assigned, listener)

    def _enter(self, assigned: Assigned, listener: socket.socket) -> RendezvousInfo:
        self.assigned, self._directive = assigned, None
        self._memory, self._group_rank = assigned.memory, assigned.group_rank
        if assigned.group_rank == 0:
            self._store = WorkerStore(assigned.store_address, listener)
        self.prepare = self.save_at = self.attempt = None
        unheeded, self._unheeded = self._unheeded, []
        for news in unheeded:
            self._heed(news)
        where = RendezvousStoreInfo(assigned.store_address, assigned.store_port)
        return RendezvousInfo(HashStore(), assigned.group_rank, assigned.group_world_size, where)

    def shutdown(self) -> bool:
        """Close the workers' store."""
        self._store = None
        return super().shutdown()

    # -- for the agent --------------------------------------------------------------------------------------------

    @property
    def fileno(self) -> int | None:
        """Readable when there is news."""
        return self._attended.link.fileno() if self._attended is not None else None

    @property
    def may_leave(self) -> bool:
        """Not the host, whom the others need."""
        return self._attended is None or self._attended.host is None

    def directive(self) -> Directive | None:
        """Give what this node has to do."""
        if self._attended is not None:
            for news in self._attended.link.receive():
                self._heed(news)
        return self._directive

    def report(self, state: NodeState, cause: Cause | None = None, rank: int | None = None) -> None:
        """Tell the leader."""
        if self._attended is not None and self._memory is not None:
            node_id = self._attended.node.id
            self._attended.link.send(Reported(node_id, self._memory.round, state, cause, rank))

    def request(self, cause: Cause) -> None:
        """Tell the leader."""
        if self._attended is not None:
            round_ = self._memory.round if self._memory is not None else -1
            self._attended.link.send(Requested(self._attended.node.id, round_, cause))

    def notice(self, what: str, until: float | None) -> None:
        """Tell the leader, and each one that comes after it."""
        self._notices[what] = until
        self._tell_notice(what, until)

    def _tell_notice(self, what: str, until: float | None) -> None:
        if self._attended is not None:
            self._attended.link.send(Noticed(self._attended.node.id, what, seconds_until(until)))

    def hold(self, round_: int, notice: int, step: int) -> None:
        """Tell the leader."""
        if self._attended is not None:
            self._attended.link.send(Held(self._attended.node.id, round_, notice, step))

    def saved(self, round_: int, notice: int, step: int) -> None:
        """Tell the leader."""
        self._notices = {what: until for what, until in self._notices.items() if until is not None}
        if self._attended is not None:
            self._attended.link.send(Saved(self._attended.node.id, round_, notice, step))

    def stay(self) -> None:
        """Stay as long as others need this node as their host, although it has no part in the job any more."""
        host = self._attended.host if self._attended is not None else None
        if host is not None and isinstance(self._directive, Leave) and not host.is_over:
            logger.info("this node stays as the host of the others, without workers")
            host.is_finished.wait()

    def leave(self, reason: str) -> None:
        """Say goodbye. The host stays until the others have left, as long as there is something to stay for."""
        self._store = None
        attended = self._attended
        if attended is None:
            return
        host, wait = attended.host, GOODBYE_SECONDS
        if host is not None and self._directive is None:
            if self.meeting.has_others:
                wait = 0.0  # the others go on at another endpoint, the sooner the better
            else:
                words = f"the rendezvous host {attended.title} has ended ({reason}), and no other endpoint is known"
                self.request(HostLost(f"{words}; {ADVICE}"))
        self._attended = None
        attended.link.send(Left(attended.node.id, reason))
        attended.link.close()
        if host is not None:
            host.close(wait)

    # -- meeting --------------------------------------------------------------------------------------------------

    def _attend(self) -> Attended:
        lost, self._lost = self._lost, None
        try:
            attended = self.meeting.attend(self._memory, lost)
        except NobodyThereError as error:
            self._directive = End(error.cause)
            raise RendezvousGracefulExitError(str(error)) from None
        self._attended, self._directive = attended, None
        what = f"the host is {attended.title}"
        if attended.host is not None:
            open_to_all = "" if self.meeting.has_token else "; without --ft-token-file, who knows the run id can join"
            what = f"this node is the host{open_to_all}"
        logger.info("joined job %s: %s", self._run_id, what)
        attended.link.send(Joined(attended.node, self._memory, self._group_rank))
        for each, until in self._notices.items():
            self._tell_notice(each, until)
        return attended

    def _await_place(self, attended: Attended, store_port: int) -> Assigned | None:
        """Wait for the next round; None when the host was lost meanwhile."""
        link, ready = attended.link, Ready(attended.node.id, store_port, self.attempt)
        if isinstance(self._directive, Stop):
            link.say_ready(ready, self._directive.round)
        else:
            link.send(ready)
        poll = select.poll()
        poll.register(link.fileno(), select.POLLIN)
        while True:
            alone_at = attended.host is not None and not attended.host.has_formed and self.meeting.has_others
            ends = [(until, what) for what, until in self._notices.items() if until is not None]
            left = [LOOK_AROUND_SECONDS] * alone_at + [max(0.0, until - time.monotonic()) for until, _ in ends]
            poll.poll(min(left) * 1000 if left else None)
            if ends and min(ends)[0] <= time.monotonic():
                self._directive = End(Preempted(min(ends)[1], attended.node.name))
                raise RendezvousGracefulExitError("this node has no more time")
            news = link.receive()
            if not news and alone_at and self.meeting.better_host(attended):
                logger.info("the others meet at another endpoint; joining them")
                self._drop()
                return None
            for number, each in enumerate(news):
                if isinstance(each, Assigned):
                    self._unheeded = news[number + 1 :]
                    return each
                if isinstance(each, Stop):
                    link.send(ready)  # the leader cannot read what it said before
                self._heed(each)
            if self._attended is None:
                return None
            if isinstance(self._directive, Leave | End):
                raise RendezvousGracefulExitError("the job is over, or goes on without this node")

    def _heed(self, news: Message | HostGone) -> None:
        match news:
            case HostGone(how):
                self._lose_host(self._attended, how)
            case Waiting(round_, nodes, memory):
                if memory is not None:
                    self._memory, self._group_rank = memory, None
                logger.info("waiting as a spare: round %d has its %d nodes", round_, nodes)
            case Stop(round_, reason):
                if self._memory is not None and round_ == self._memory.round and self._directive is None:
                    self._directive = news
                    logger.info("round %d is over (%s); stopping the workers", round_, reason)
            case Prepare(round_):
                if self._memory is not None and round_ == self._memory.round:
                    self.prepare, self.save_at = news, None
            case SaveAt(round_):
                if self._memory is not None and round_ == self._memory.round:
                    self.save_at = news
            case Leave() | End():
                self._directive = news
            case Assigned():
                pass  # only `next_rendezvous` can take it

    def _lose_host(self, attended: Attended | None, how: str) -> None:
        if attended is None or isinstance(self._directive, Leave | End):
            return  # it has told us all that there was to tell
        words = "this node has given up as the host" if attended.host is not None else LOST_WORDS.get(how, how)
        logger.error("lost the rendezvous host %s: %s", attended.title, words)
        self._lost = self.meeting.index(attended.where)
        self._drop()
        round_ = self._memory.round if self._memory is not None else -1
        self._directive = Stop(round_, Reason("host_lost", f"lost the rendezvous host: {words}"))

    def _drop(self) -> None:
        attended, self._attended = self._attended, None
        if attended is not None:
            attended.link.close()
            if attended.host is not None:
                attended.host.close(0.0)
