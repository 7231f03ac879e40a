"""The hand that carries out a plan of faults, then takes back what lasts."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import psutil
import trio

from taskkit import seqpacket
from taskkit.wire import codec
from taskkit.wire.messages import Operation
from tests.chaos.clients import Clients
from tests.chaos.django_link import DjangoLink
from tests.chaos.history import History, Hit
from tests.chaos.load import FLOOD, SCRIBBLE, Load
from tests.chaos.plan import Fault
from tests.chaos.world import World, children_of, descriptors_of

#: What a web server hears from scanners, broken proxies and the bored.
GARBAGE: Final = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS hello
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",  # HTTP/2 without asking
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: " + b"a" * 70_000,  # a head without an end
    b"POST /api/v1/runs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n{",  # then nothing
    b"POST /api/v1/runs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /api/v1/runs HTTP/1.1\r\nHost: localhost\r\n\r\n" * 40,  # pipelined, never read
    b"\x00" * 5_000,
    b"\r\n" * 2_000,
)

#: Seconds to wait for a victim: after the death of a supervisor there is nobody for a second.
_VICTIM_SECONDS: Final = 2.0


class Saboteur:
    """Carries out faults, each in a task of its own.

    Attributes:
      missed: faults that found no victim.
      say: is told one line per fault.
    """

    def __init__(
        self,
        history: History,
        world: World,
        clients: Clients,
        load: Load,
        django: DjangoLink,
        say: Callable[[str], None],
    ) -> None:
        self._history = history
        self._world = world
        self._clients = clients
        self._load = load
        self._django = django
        self._say = say
        self._began = trio.current_time()
        self.missed = 0
        self._disk_users = 0
        self._limits: dict[tuple[int, int], int] = {}
        self._actions: dict[str, Callable[[Fault, list[int]], Awaitable[None]]] = {
            "kill": self._kill,
            "stop": self._stop,
            "reload": self._reload,
            "upgrade": self._upgrade,
            "park": self._park,
            "full-disk": self._full_disk,
            "full-file": self._full_file,
            "full-pipe": self._full_pipe,
            "descriptors": self._descriptors,
            "garbage-http": self._garbage_http,
            "garbage-frames": self._garbage_frames,
            "clients-reset": self._clients_reset,
            "clients-stalled": self._clients_stalled,
            "database-locked": self._database_locked,
            "database-away": self._database_away,
            "django-killed": self._django_killed,
        }

    async def run(self, plan: list[Fault], seconds: float) -> None:
        """Carry out the plan; return after `seconds`, with everything that lasts taken back."""
        self._began = trio.current_time()
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                for fault in plan:
                    await trio.sleep_until(self._began + fault.at)
                    nursery.start_soon(self._carry_out, fault)
                await trio.sleep_until(self._began + seconds)

    async def _carry_out(self, fault: Fault) -> None:
        victims = self._victims(fault)
        with trio.move_on_after(_VICTIM_SECONDS):
            while victims is None:
                await trio.sleep(0.05)
                victims = self._victims(fault)
        if victims is None:
            self.missed += 1
            return
        at = trio.current_time()
        self._history.hits.append(Hit(fault.number, fault.kind.name, at, fault.seconds, tuple(victims)))
        lasting = f" for {fault.seconds:.1f} s" if fault.seconds else ""
        hit = f", pid {'+'.join(map(str, victims))}" if victims else ""
        self._say(f"{at - self._began:8.2f} s  {fault.number:4}  {fault.kind.name}{lasting}{hit}")
        action = fault.kind.name if fault.kind.name in self._actions else fault.kind.action
        try:
            await self._actions[action](fault, victims)
        except (
            OSError,
            psutil.Error,
        ) as error:  # the machine has changed under its hand: the next one may do
            self._say(f"{trio.current_time() - self._began:8.2f} s  {fault.number:4}  went wrong: {error}")

    def _victims(self, fault: Fault) -> list[int] | None:
        """Return a pid for each role of the kind, or None when one of them is not there."""
        chosen: list[int] = []
        for role in fault.kind.victims:
            pid = fault.pick([pid for pid in self._candidates(role) if pid not in chosen])
            if pid is None:
                return None
            chosen.append(pid)
        return chosen

    def _candidates(self, role: str) -> list[int]:
        if role != "busy":
            return self._world.pids(role)
        return [pid for pid in self._world.pids("runner") if pid in self._clients.running]

    # --- processes -----------------------------------------------------------------------------------------

    async def _kill(self, fault: Fault, victims: list[int]) -> None:
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def _stop(self, fault: Fault, victims: list[int]) -> None:
        """Stop for a while. By pidfd: the number may be another process's when it is time to go on."""
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(victims[0])
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
                await trio.sleep(fault.seconds)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGCONT)
                os.close(pidfd)

    async def _full_pipe(self, fault: Fault, victims: list[int]) -> None:
        """Have a task say more than its pipe holds while nobody reads."""
        self._load.submit(FLOOD)
        await trio.sleep(0.3)
        await self._stop(fault, victims)

    # --- planned work, which is no fault by itself ---------------------------------------------------------

    async def _reload(self, fault: Fault, victims: list[int]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victims[0], signal.SIGHUP)

    async def _upgrade(self, fault: Fault, victims: list[int]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victims[0], signal.SIGUSR2)

    async def _park(self, fault: Fault, victims: list[int]) -> None:
        """Ask for a planned restart of the gateway; whether it comes off is not waited for."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(1.0)
            sock.connect(str(self._world.tree.state_dir / "control.sock"))
            seqpacket.send(sock, codec.pack(Operation(name="restart-gateway")))

    # --- what a process may use ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _limited(self, pid: int, which: int, value: int) -> Iterator[None]:
        """Lower the soft limit of a process for a while; of what it starts meanwhile, too, as limits are inherited."""
        soft = self._limits.setdefault((pid, which), _soft_limit(pid, which))
        _set_soft_limit(pid, which, value)
        try:
            yield
        finally:
            for each in (pid, *children_of(pid)):
                if _soft_limit(each, which) == value:
                    _set_soft_limit(each, which, soft)

    async def _descriptors(self, fault: Fault, victims: list[int]) -> None:
        """Leave room for one more descriptor, or for none."""
        count = descriptors_of(victims[0]) or 30
        with self._limited(victims[0], resource.RLIMIT_NOFILE, count + int(fault.rank * 3)):
            await trio.sleep(fault.seconds)

    async def _full_file(self, fault: Fault, victims: list[int]) -> None:
        """Let no file of the gateway grow: what a quota does, where nothing can be mounted."""
        with self._limited(victims[0], resource.RLIMIT_FSIZE, 4096):
            await trio.sleep(fault.seconds)

    async def _full_disk(self, fault: Fault, victims: list[int]) -> None:
        self._world.disk.fill()
        self._disk_users += 1
        try:
            await trio.sleep(fault.seconds)
        finally:
            self._disk_users -= 1
            if not self._disk_users:
                self._world.disk.free()

    # --- clients and their garbage -------------------------------------------------------------------------

    async def _garbage_http(self, fault: Fault, victims: list[int]) -> None:
        rng = random.Random(fault.rank)
        data = GARBAGE[int(fault.rank * len(GARBAGE))] + rng.randbytes(rng.randint(0, 300))
        with trio.move_on_after(2.0), contextlib.suppress(OSError), trio.socket.socket() as sock:
            await sock.connect(("127.0.0.1", self._world.port))
            await sock.send(data)
            if fault.rank < 0.5:
                await trio.sleep(1.0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    async def _garbage_frames(self, fault: Fault, victims: list[int]) -> None:
        self._load.submit(SCRIBBLE)

    async def _clients_reset(self, fault: Fault, victims: list[int]) -> None:
        self._clients.reset_some(fault.rank)

    async def _clients_stalled(self, fault: Fault, victims: list[int]) -> None:
        self._clients.stall_some(fault.rank, fault.seconds)

    # --- Django's database ---------------------------------------------------------------------------------

    async def _database_locked(self, fault: Fault, victims: list[int]) -> None:
        """Hold the write lock, as a long migration does."""
        with contextlib.suppress(sqlite3.Error):
            connection = sqlite3.connect(self._world.database, timeout=0, isolation_level=None)
            with contextlib.closing(connection):
                connection.execute("BEGIN IMMEDIATE")
                await trio.sleep(fault.seconds)

    async def _database_away(self, fault: Fault, victims: list[int]) -> None:
        """Put a directory in the file's place, so that nobody makes an empty database there."""
        path = self._world.database
        away = path.with_name("away")
        if away.exists():  # away already
            return
        path.rename(away)
        path.mkdir()
        try:
            await trio.sleep(fault.seconds)
        finally:
            path.rmdir()
            away.rename(path)

    async def _django_killed(self, fault: Fault, victims: list[int]) -> None:
        self._django.kill()


def _soft_limit(pid: int, which: int) -> int:
    """Return the soft limit of a process; -1 for none, or when it has gone."""
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(pid).rlimit(which)[0])
    return -1


def _set_soft_limit(pid: int, which: int, value: int) -> None:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        process.rlimit(which, (value, process.rlimit(which)[1]))
