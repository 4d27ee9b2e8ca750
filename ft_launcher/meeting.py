"""Where the nodes of a job meet: which endpoint is this machine's own, who is the host, and why nobody can be reached.

A cold start and the flight from a lost host are the same search. Every node looks at all endpoints in the same order;
it joins a job that it finds there, and becomes the host where the endpoint is its own and those before it stay empty.
"""

import errno
import logging
import re
import select
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NamedTuple

import msgspec
from torch.distributed import DistError

from ft_launcher.addresses import is_loopback, is_own, listen, names_loopback
from ft_launcher.causes import HostLost, Refused, TooFewNodes
from ft_launcher.errors import UsageError
from ft_launcher.exchange import Keys
from ft_launcher.formation import Settings
from ft_launcher.host import ANNOUNCEMENT, Host, announcement_seal
from ft_launcher.lifeline import Beats
from ft_launcher.link import Link, bounded, connect_store
from ft_launcher.records import PROTOCOL, Announcement, Memory, Node, decode_announcement
from ft_launcher.seal import Seal, SealBrokenError, derive_token, prefix

__all__ = ["ADVICE", "Attended", "Endpoint", "Meeting", "NobodyThereError", "parse_endpoints"]

logger = logging.getLogger(__name__)

DEFAULT_PORT = 29400
"""torch's for c10d (torch.distributed.elastic.rendezvous.c10d_rendezvous_backend)."""

LOOK_SECONDS = 1.5
"""How long one look at an endpoint may take: a round trip and torch's handshake, with one lost packet (1 s)."""

PATIENCE = 3.0
"""Seconds for which an endpoint may stay empty before the machine of the next one becomes the host."""

REJOIN_SECONDS = 7.0
"""For how long a node whose only host was lost tries again: with the lifeline's limit this makes less than 15 s."""

ADVICE = "with --rdzv-endpoint a:29400,b:29400,c:29400 the others would have gone on"

SAY_EVERY = 5.0
RETRY_SECONDS = (0.05, 1.0)


_ENDPOINT = re.compile(r"(?:\[([0-9a-fA-F:.%\w]+)\]|([^:\[\]\s]+))(?::(\d{1,5}))?")
"""host, host:port, or [IPv6 address]:port."""


class Endpoint(NamedTuple):
    """One of the places of --rdzv-endpoint."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Attended(NamedTuple):
    """What a node has once it has met the others."""

    link: Link
    node: Node  # with the id and the address that the others know
    host: Host | None  # if this node is the host
    where: Endpoint
    title: str  # of the host, in sentences


class NobodyThereError(Exception):
    """No host could be found, or it wants nothing of this node. `cause` ends the launcher."""

    def __init__(self, cause: HostLost | Refused | TooFewNodes) -> None:
        super().__init__(cause.description)
        self.cause = cause


class _Look(NamedTuple):
    endpoint: int
    address: str
    announcement: Announcement


def parse_endpoints(text: str, default_port: int = DEFAULT_PORT) -> list[Endpoint]:
    """Read host[:port],host[:port],... Raises UsageError."""
    if not text.strip():
        raise UsageError("--rdzv-endpoint: several nodes need a place to meet, host:port, the same for all of them")
    endpoints = []
    for part in text.split(","):
        match = _ENDPOINT.fullmatch(part.strip())
        host, port = (match[1] or match[2], match[3] or str(default_port)) if match else ("", "")
        if not host or int(port) > 65535:
            raise UsageError(f"--rdzv-endpoint {text}: must be host:port, or several of them with commas between")
        endpoints.append(Endpoint(host, int(port)))
    return endpoints


class Meeting:
    """The endpoints of a job, seen from this node."""

    def __init__(
        self,
        run_id: str,
        endpoints: Sequence[Endpoint],
        node: Node,
        settings: Settings,
        beats: Beats,
        *,
        token: bytes | None,
        is_host: bool | None = None,
        joins_only: bool = False,
        placement_path: str = "",
        on_lease: Callable[[float], None] | None = None,
    ) -> None:
        """`is_host`: whether this node is the first endpoint's; None: find out by the addresses of this machine.

        `joins_only`: this node comes to a job that is there already, and must not begin it a second time.
        `on_lease`: called with the instant up to which the workers of this node may go on.
        """
        self._on_lease = on_lease
        self._run_id, self._endpoints, self._node, self._settings = run_id, list(endpoints), node, settings
        self._beats, self._token, self._is_host = beats, token, is_host
        self._joins_only, self._placement_path = joins_only, placement_path
        job_token = derive_token(token, run_id)
        self._seal = Seal(job_token)
        self._prefix = prefix(job_token, run_id)
        self._addresses: dict[int, list[str]] = {}
        self._mine: dict[int, bool] = {}
        self._why: dict[int, str] = {}
        self._said_at = time.monotonic()

    def attend(self, memory: Memory | None = None, lost: int | None = None) -> Attended:
        """Meet the others. `lost`: the endpoint, by its index, whose host was lost just now.

        Raises NobodyThereError when that takes too long, UsageError for what can never work.
        """
        order = list(range(len(self._endpoints)))
        if lost is not None:
            order = order[lost + 1 :] + order[: lost + 1]
        # A machine that was replaced keeps its name and gets another address.
        self._addresses.clear()
        self._mine.clear()
        began = self._said_at = time.monotonic()
        limit = self._limit(lost, memory)
        delay = RETRY_SECONDS[0]
        while True:
            looks = [look for index in order if (look := self._look(index)) is not None]
            best = self._best(looks, memory)
            if best is not None and (attended := self._join(best)) is not None:
                return attended
            elapsed = time.monotonic() - began
            if best is None and (attended := self._host_if_mine(order, elapsed, memory)) is not None:
                return attended
            if elapsed > limit:
                raise NobodyThereError(self._nobody(lost, elapsed))
            self._say(began)
            select.select([], [], [], delay)
            delay = min(2 * delay, RETRY_SECONDS[1])

    @property
    def has_token(self) -> bool:
        """The nodes share a secret."""
        return self._token is not None

    @property
    def has_others(self) -> bool:
        """There is more than one endpoint."""
        return len(self._endpoints) > 1

    def index(self, endpoint: Endpoint) -> int:
        """Give the place of `endpoint` in the list."""
        return self._endpoints.index(endpoint)

    def better_host(self, attended: Attended) -> bool:
        """Say whether a host of this job is elsewhere that goes before the one that was `attended`."""
        mine = self.index(attended.where)
        for index in range(len(self._endpoints)):
            look = self._look(index) if index != mine else None
            if look is not None and (index < mine or look.announcement.round >= 0):
                return True
        return False

    # -- searching ------------------------------------------------------------------------------------------------

    def _limit(self, lost: int | None, memory: Memory | None) -> float:
        timing = self._settings.timing
        if memory is None and self._joins_only:
            return timing.failover_timeout  # in which a job that lives has found another host
        if lost is None:
            return timing.join_timeout
        return REJOIN_SECONDS if len(self._endpoints) == 1 else timing.failover_timeout

    def _best(self, looks: list[_Look], memory: Memory | None) -> _Look | None:
        # A host older than what this node remembers has been left by the others, too.
        there = [look for look in looks if memory is None or look.announcement.epoch >= memory.epoch]
        formed = [look for look in there if look.announcement.round >= 0]
        if formed:
            return max(formed, key=lambda look: look.announcement.epoch)
        return next(iter(there), None)

    def _look(self, index: int) -> _Look | None:
        """Give whose store is at the endpoint, None if none is; `_why` has the reason then."""
        endpoint = self._endpoints[index]
        for address in self._resolved(index):
            try:
                with socket.create_connection((address, endpoint.port), LOOK_SECONDS):
                    pass
            except OSError as error:
                self._why[index] = _reason(error)
                continue
            try:
                store = connect_store(address, endpoint.port, LOOK_SECONDS)
                store.wait([ANNOUNCEMENT], timedelta(seconds=LOOK_SECONDS))
                body = announcement_seal(self._token).open(ANNOUNCEMENT, store.get(ANNOUNCEMENT))
                announcement = decode_announcement(body)
            except (DistError, TimeoutError):
                self._why[index] = "something answers there that is not the store of an ft_launcher job"
                continue
            except SealBrokenError:
                what = "has another token" if self._token else "has a token, and this node none"
                advice = "give all nodes the same --ft-token-file (or FT_TOKEN)"
                raise NobodyThereError(Refused(f"the job at {endpoint} {what}; {advice}")) from None
            except (msgspec.MsgspecError, ValueError):
                self._why[index] = "an ft_launcher of another version answers there"
                continue
            self._why.pop(index, None)
            self._check(endpoint, announcement)
            return _Look(index, address, announcement)
        return None

    def _check(self, endpoint: Endpoint, announcement: Announcement) -> None:
        host = f"{announcement.name} (pid {announcement.pid})"
        if announcement.protocol != PROTOCOL:
            raise NobodyThereError(
                Refused(
                    f"the launcher on {host} speaks protocol {announcement.protocol}, this one on {self._node.name}"
                    f" {PROTOCOL}; install the same ft_launcher on both"
                )
            )
        if announcement.run_id != self._run_id:
            raise NobodyThereError(
                Refused(
                    f"--rdzv-id {self._run_id}: the launcher on {host} at {endpoint} runs job"
                    f" {announcement.run_id!r}; give both the same --rdzv-id, or another port to one of them"
                )
            )

    def _join(self, look: _Look, host: Host | None = None) -> Attended | None:
        keys = Keys(self._prefix, look.announcement.incarnation)
        node_id = uuid.uuid4().hex
        where = (look.address, self._endpoints[look.endpoint].port)
        try:
            link = Link(where, look.announcement.lifeline_port, node_id, keys, self._seal, self._beats, self._on_lease)
        except (DistError, OSError) as error:
            self._why[look.endpoint] = " ".join(str(error).split("\n")[0].split())
            return None
        address = self._node.address or (host.address if host is not None else link.local_address)
        if host is not None and not self._node.address and is_loopback(address):
            address = self._own_address(look.endpoint, address)
        node = msgspec.structs.replace(self._node, id=node_id, address=address)
        title = f"{look.announcement.name} ({self._endpoints[look.endpoint]})"
        return Attended(link, node, host, self._endpoints[look.endpoint], title)

    def _host_if_mine(self, order: list[int], elapsed: float, memory: Memory | None) -> Attended | None:
        if memory is None and self._joins_only:
            return None
        for position, index in enumerate(order):
            if elapsed < position * PATIENCE or not self._is_mine(index):
                continue
            listener = self._listen(index)
            if listener is None:
                continue
            settings = msgspec.structs.replace(self._settings, endpoint=index)
            host = Host(
                listener,
                self._run_id,
                self._node,
                settings,
                lambda incarnation: Keys(self._prefix, incarnation),
                self._seal,
                self._token,
                self._beats,
                memory,
                self._placement_path,
            )
            announcement = Announcement(
                run_id=self._run_id,
                incarnation=host.incarnation,
                name=self._node.name,
                pid=self._node.pid,
                lifeline_port=host.lifelines.port,
                epoch=0,
                round=-1,
            )
            attended = self._join(_Look(index, host.address, announcement), host)
            if attended is not None:
                return attended
            host.close(0.0)
        return None

    def _listen(self, index: int) -> socket.socket | None:
        endpoint = self._endpoints[index]
        address = self._resolved(index)[0]
        if self._is_host or (is_loopback(address) and not names_loopback(endpoint.host)):
            address = "::" if ":" in address else "0.0.0.0"  # noqa: S104 (the only address the others know)
        try:
            return listen(address, endpoint.port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and "not the store" in self._why.get(index, ""):
                raise UsageError(
                    f"--rdzv-endpoint {endpoint}: port {endpoint.port} of this machine is in use by another program,"
                    " which is no ft_launcher; choose another port"
                ) from None
            self._why[index] = _reason(error)
            return None

    # -- addresses ------------------------------------------------------------------------------------------------

    def _resolved(self, index: int) -> list[str]:
        """Give the numeric addresses of the endpoint; a resolver is asked once, and not waited for longer than 5 s."""
        if index not in self._addresses:
            endpoint = self._endpoints[index]
            answer = _resolve(endpoint.host, 5.0)
            if isinstance(answer, list):
                self._addresses[index] = answer
                self._refuse_foreign_loopback(endpoint, answer)
            elif isinstance(answer, TimeoutError):
                self._why[index] = f"the name {endpoint.host} was not resolved within 5 s; give a numeric address"
            else:
                self._why[index] = f"the name {endpoint.host} cannot be resolved ({answer.strerror})"
        return self._addresses.get(index, [])

    def _refuse_foreign_loopback(self, endpoint: Endpoint, addresses: list[str]) -> None:
        own_names = {socket.gethostname(), socket.gethostname().split(".")[0], self._node.name}
        if (
            self._is_host is None
            and addresses
            and is_loopback(addresses[0])
            and not names_loopback(endpoint.host)
            and not own_names & {endpoint.host, endpoint.host.split(".")[0]}
        ):
            raise UsageError(
                f"--rdzv-endpoint {endpoint}: on node {self._node.name} the name {endpoint.host} means {addresses[0]},"
                f" which is this node itself and not {endpoint.host}; mend /etc/hosts here, or give a numeric address"
            )

    def _is_mine(self, index: int) -> bool:
        if self._is_host is not None and index == 0:
            return self._is_host and bool(self._resolved(index))
        if index not in self._mine:
            addresses = self._resolved(index)
            if not addresses:
                return False
            self._mine[index] = any(map(is_own, addresses))
        return self._mine[index]

    def _own_address(self, index: int, default: str) -> str:
        """Give the address under which other machines reach this one, when its name means the loopback here."""
        if names_loopback(self._endpoints[index].host):
            return default  # all nodes are on this machine
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                # Nothing is sent: the kernel chooses the address that packets to elsewhere would have (RFC 5737).
                probe.connect(("192.0.2.1", 9))
            except OSError:
                return default
            return str(probe.getsockname()[0])

    # -- saying why -----------------------------------------------------------------------------------------------

    def _say(self, began: float) -> None:
        now = time.monotonic()
        if now - self._said_at >= SAY_EVERY:
            self._said_at = now
            logger.warning("looking for the other nodes for %.0f s: %s", now - began, self._complaints())

    def _complaints(self) -> str:
        return "; ".join(f"{self._endpoints[index]}: {why}" for index, why in sorted(self._why.items()))

    def _nobody(self, lost: int | None, elapsed: float) -> HostLost | TooFewNodes:
        if lost is None and self._joins_only:
            return TooFewNodes(
                f"no job was met at --rdzv-endpoint within {elapsed:.0f} s: {self._complaints()}; joins_only of"
                " --rdzv-conf keeps this node from beginning one"
            )
        if lost is None:
            mine = [str(self._endpoints[index]) for index in self._mine if self._mine[index]]
            own = f"; of the endpoints, {', '.join(mine)} is this machine's" if mine else "; none is on this machine"
            return TooFewNodes(
                f"nobody was met at --rdzv-endpoint within {elapsed:.0f} s: {self._complaints()}{own}; the launcher on"
                " the machine of the first endpoint is the host, is it running?"
            )
        endpoint = self._endpoints[lost]
        if len(self._endpoints) == 1:
            return HostLost(
                f"the rendezvous host at {endpoint} was lost ({self._complaints()}), and no other endpoint is known;"
                f" {ADVICE}"
            )
        return HostLost(
            f"the rendezvous host at {endpoint} was lost, and no other endpoint brought enough nodes together within"
            f" {elapsed:.0f} s: {self._complaints()}"
        )


def _resolve(host: str, seconds: float) -> list[str] | OSError:
    try:
        # The C library's resolver cannot be interrupted, only left behind.
        found = bounded(lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM), seconds)
    except OSError as error:
        return error
    return list(dict.fromkeys(str(each[4][0]) for each in found))


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError) or error.errno in (errno.ETIMEDOUT, errno.EAGAIN):
        return "no answer (the machine is down, or a firewall drops what is sent there)"
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens there (is the launcher of that machine running?)"
    return error.strerror or str(error)
