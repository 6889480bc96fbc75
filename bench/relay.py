"""A link with delay between real processes of one machine.

    python bench/relay.py --nodes 2 --latency 20 [--bandwidth 200] [--jitter 1] -- COMMAND ...

Runs COMMAND once in each of several network namespaces, joined by a relay that holds every packet
back. It is given what ``torch.distributed.init_process_group("gloo")`` reads from the environment:
``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``, ``GLOO_SOCKET_IFNAME``. From Python::

    with relay.Network(nodes=2, latency_ms=20) as network:
        workers = [network.start(node, command) for node in range(2)]
        network.change(latency_ms=100)
        network.silence(1)          # its process lives, and nothing of it arrives
        network.restore(1)

Nothing of this has a name outside. A namespace, its device and its processes' sockets belong to
open files alone, so the kernel removes them when the last process that holds them is gone, whatever
it ended by. Making them takes root (CAP_SYS_ADMIN, CAP_NET_ADMIN) and /dev/net/tun; :func:`missing`
says in a line what is not there. No packet leaves the machine.

What the link is: between each two nodes one line for each direction. A packet leaves when the line
is free, takes its bits over the bandwidth, and arrives after the latency. Packets of a line keep
their order and none is lost, so that what is measured is delay, not recovery. Packets are up to
64,000 bytes, sending starts at full rate after a pause, and receive windows are large, as on a
tuned long-distance link; every namespace uses TCP Reno, which every kernel has. The relay is one
process under SCHED_FIFO where that is allowed, so that busy workers do not delay it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import fcntl
import heapq
import itertools
import json
import math
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

#: The device in each namespace, for GLOO_SOCKET_IFNAME.
DEVICE = "link0"
#: Where node 0 listens for the others, for MASTER_PORT.
PORT = 29500
#: Bytes of the largest packet.
MTU = 64000

_TUN = "/dev/net/tun"
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C
_SIOCSIFMTU, _SIOCSIFTXQLEN = 0x8922, 0x8943
_IFF_UP = 0x1
_PR_SET_TIMERSLACK = 29
#: Of one namespace: no wait for windows to grow, no slow start after a pause.
_TCP = {
    "tcp_congestion_control": "reno",
    "tcp_slow_start_after_idle": "0",
    "tcp_no_metrics_save": "1",
    "tcp_rmem": "4096 8388608 33554432",
    "tcp_wmem": "4096 4194304 33554432",
}


@dataclasses.dataclass
class _Line:
    """What every line between two nodes does: seconds, bits a second."""

    latency: float
    bandwidth: float
    jitter: float
    silent: list[int]


def address(node: int) -> str:
    """The IPv4 address of a node, counted from 0."""
    return f"10.77.0.{node + 1}"


def missing() -> str | None:
    """Say in one line what a :class:`Network` lacks here, or return None."""
    if sys.platform != "linux":
        return f"network namespaces are Linux's, and this is {sys.platform}"
    if os.geteuid() != 0:
        return "network namespaces need root, and this is another user"
    return _refused()


@lru_cache(maxsize=1)
def _refused() -> str | None:
    """What the kernel says when it is asked for a namespace."""
    try:
        for file in _namespace(0):
            os.close(file)
    except OSError as error:
        return f"no network namespace with a TUN device can be made here: {error}"
    return None


class Network:
    """Network namespaces, each with one device, joined by a relay process.

    Args:
        nodes: how many, 1 to 64.
        latency_ms: milliseconds from leaving a line to arriving, one way.
        bandwidth_mbit: 10^6 bits a second of each line, each direction; None: as fast as the relay.
        jitter_ms: each packet's latency differs by up to so many milliseconds to either side, drawn
            evenly from a fixed seed; packets keep their order, so some wait for the one before.

    Raises:
        ValueError: for what is none of these.
        OSError: where namespaces cannot be made (:func:`missing`).

    Attributes:
        addresses: of the nodes, in order.
    """

    def __init__(
        self,
        nodes: int,
        *,
        latency_ms: float = 0.0,
        bandwidth_mbit: float | None = None,
        jitter_ms: float = 0.0,
    ) -> None:
        if not 1 <= nodes <= 64:
            raise ValueError(f"nodes must be 1 to 64, not {nodes}")
        self._line = _Line(0.0, math.inf, 0.0, [])
        self._set(latency_ms, bandwidth_mbit, jitter_ms)
        self.addresses = [address(node) for node in range(nodes)]
        self._processes: list[subprocess.Popen[Any]] = []
        self._namespaces: list[int] = []

    def __enter__(self) -> Network:  # noqa: PYI034 (Self is in typing from Python 3.11 on)
        if reason := missing():
            raise OSError(reason)
        tuns: list[int] = []
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(10)
        try:
            for node in range(len(self.addresses)):
                namespace, tun = _namespace(node)
                self._namespaces.append(namespace)
                tuns.append(tun)
            given = [theirs.fileno(), *tuns]
            self._relay = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, "--relay", *map(str, given)],
                pass_fds=given,
                start_new_session=True,  # Ctrl-C is the caller's: this one ends with the network
            )
        except BaseException:
            self._close()
            raise
        finally:
            theirs.close()
            for tun in tuns:
                os.close(tun)
        try:
            self._tell()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Kill every process in the namespaces, children of children too, then the relay."""
        for _ in range(100):
            if not (inside := list(self._inhabitants())):
                break
            for process in inside:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.01)
        for started in self._processes:
            started.wait()
            for pipe in filter(None, (started.stdin, started.stdout, started.stderr)):
                with contextlib.suppress(BrokenPipeError):  # what it did not read
                    pipe.close()
        self._relay.kill()
        self._relay.wait()
        self._close()

    def _inhabitants(self) -> Iterator[int]:
        """Processes whose namespace is one of these."""
        ours = {os.fstat(namespace).st_ino for namespace in self._namespaces}
        for process in map(int, filter(str.isdecimal, os.listdir("/proc"))):
            with contextlib.suppress(OSError):  # it has ended, or is another's
                if process != os.getpid() and os.stat(f"/proc/{process}/ns/net").st_ino in ours:
                    yield process

    def _close(self) -> None:
        self._control.close()
        for namespace in self._namespaces:
            os.close(namespace)
        self._namespaces.clear()

    @contextlib.contextmanager
    def inside(self, node: int) -> Iterator[None]:
        """Move the calling thread into a node's namespace, and back.

        Sockets that are made and processes that are started inside belong to the node for good.
        """
        if not 0 <= node < len(self.addresses):
            raise ValueError(f"node must be 0 to {len(self.addresses) - 1}, not {node}")
        with _returning():
            _call("setns", self._namespaces[node], _CLONE_NEWNET)
            yield

    def start(
        self,
        node: int,
        command: Sequence[str],
        *,
        env: dict[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start a process in a node's namespace, which ends with the network at the latest.

        Args:
            node: where; also its RANK.
            env: the environment (default: this process's), to which what gloo needs is added.
            options: of :class:`subprocess.Popen`.
        """
        environment = (dict(os.environ) if env is None else env) | self.environment(node)
        with self.inside(node):  # Ctrl-C is the caller's, as it is with the relay
            process = subprocess.Popen(command, env=environment, start_new_session=True, **options)
        self._processes.append(process)
        return process

    def environment(self, node: int) -> dict[str, str]:
        """What ``torch.distributed`` reads, for one process a node."""
        return {
            "RANK": str(node),
            "WORLD_SIZE": str(len(self.addresses)),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": self.addresses[0],
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": DEVICE,
        }

    def change(
        self,
        *,
        latency_ms: float | None = None,
        bandwidth_mbit: float | None = None,
        jitter_ms: float | None = None,
    ) -> None:
        """Change every line, for packets that come from now on; what is None stays.

        ``bandwidth_mbit=math.inf`` takes the limit away.
        """
        line = self._line
        self._set(
            line.latency * 1e3 if latency_ms is None else latency_ms,
            line.bandwidth / 1e6 if bandwidth_mbit is None else bandwidth_mbit,
            line.jitter * 1e3 if jitter_ms is None else jitter_ms,
        )
        self._tell()

    def silence(self, node: int) -> None:
        """Drop all packets from and to a node, also those that are under way."""
        if node not in self._line.silent:
            self._line.silent.append(node)
        self._tell()

    def restore(self, node: int) -> None:
        """Undo :meth:`silence`. TCP sends again what was lost, after up to minutes."""
        if node in self._line.silent:
            self._line.silent.remove(node)
        self._tell()

    def carried(self) -> list[list[int]]:
        """Return bytes delivered so far, headers included, from each node to each."""
        return self._tell()

    def _set(self, latency_ms: float, bandwidth_mbit: float | None, jitter_ms: float) -> None:
        bandwidth = math.inf if bandwidth_mbit is None else bandwidth_mbit
        for name, value in (("latency_ms", latency_ms), ("jitter_ms", jitter_ms)):
            if not 0 <= value < 60e3:
                raise ValueError(f"{name} must be 0 to 60,000 ms, not {value}")
        if not bandwidth > 0:
            raise ValueError(f"bandwidth_mbit must be above 0, not {bandwidth}")
        silent = self._line.silent
        self._line = _Line(latency_ms / 1e3, bandwidth * 1e6, jitter_ms / 1e3, silent)

    def _tell(self) -> list[list[int]]:
        """Have the relay take over what the lines do; it answers with what it has delivered."""
        answer = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._control.send(json.dumps(dataclasses.asdict(self._line)).encode())
            answer = self._control.recv(1 << 18)
        if not answer:
            raise OSError(f"the relay has ended with status {self._relay.wait()}")
        carried: list[list[int]] = json.loads(answer)
        return carried


# ------------------------------------------------------------------------------------- namespaces


def _call(name: str, *arguments: int) -> None:
    """Call libc; Python has these two from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


@contextlib.contextmanager
def _returning() -> Iterator[None]:
    """Take the calling thread back to its namespace at the end."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        yield
    finally:
        _call("setns", own, _CLONE_NEWNET)
        os.close(own)


def _namespace(node: int) -> tuple[int, int]:
    """Make a namespace with a device that is up; return both as open files."""
    with _returning(), contextlib.ExitStack() as undo:
        _call("unshare", _CLONE_NEWNET)
        tun = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)  # its device is where it was opened
        undo.callback(os.close, tun)
        namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        undo.callback(os.close, namespace)
        fcntl.ioctl(tun, _TUNSETIFF, _request(DEVICE, "H", _IFF_TUN | _IFF_NO_PI))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            for request, argument in (
                (_SIOCSIFADDR, _request(DEVICE, "HH4s", *_inet(address(node)))),
                (_SIOCSIFNETMASK, _request(DEVICE, "HH4s", *_inet("255.255.255.0"))),
                (_SIOCSIFMTU, _request(DEVICE, "i", MTU)),
                (_SIOCSIFTXQLEN, _request(DEVICE, "i", 10000)),
                (_SIOCSIFFLAGS, _request(DEVICE, "H", _IFF_UP)),
                (_SIOCSIFFLAGS, _request("lo", "H", _IFF_UP)),
            ):
                fcntl.ioctl(any_socket, request, argument)
        for name, value in _TCP.items():
            Path("/proc/sys/net/ipv4", name).write_text(value, encoding="ascii")
        undo.pop_all()
        return namespace, tun


def _request(device: str, form: str, *values: Any) -> bytes:
    """A ``struct ifreq``: the device's name, then what is asked for."""
    return (struct.pack("16s" + form, device.encode(), *values)).ljust(40, b"\0")


def _inet(written: str) -> tuple[int, int, bytes]:
    """The fields of a ``struct sockaddr_in``."""
    return socket.AF_INET, 0, socket.inet_aton(written)


# -------------------------------------------------------------------------------------- the relay


def _serve(control: socket.socket, tuns: Sequence[int]) -> None:
    """Carry packets until the other end of ``control`` is closed."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)  # ns; 50,000 is usual
    nodes = range(len(tuns))
    node_of = {socket.inet_aton(address(node)): node for node in nodes}
    draw, number = random.Random(0), itertools.count()
    line = _Line(0.0, math.inf, 0.0, [])
    under_way: list[tuple[float, int, int, int, bytes]] = []  # due, number, from, to, packet
    free = [[0.0 for _ in nodes] for _ in nodes]  # when a line has sent what it was given
    last = [[0.0 for _ in nodes] for _ in nodes]  # when the last packet of a line arrives
    carried = [[0 for _ in nodes] for _ in nodes]
    while True:
        now = time.monotonic()
        while under_way and under_way[0][0] <= now:
            _, _, source, to, packet = heapq.heappop(under_way)
            if source not in line.silent and to not in line.silent:
                os.write(tuns[to], packet)
                carried[source][to] += len(packet)
        wait = _pause(under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select([control, *tuns], [], [], wait)
        if control in ready:
            asked = control.recv(1 << 16)
            if not asked:
                return
            line = _Line(**json.loads(asked))
            control.send(json.dumps(carried).encode())
        for source in nodes:
            if tuns[source] not in ready:
                continue
            for packet in _read(tuns[source]):
                to = node_of.get(packet[16:20], source)
                # What is no IPv4 packet to another node (IPv6 looking for routers) goes nowhere.
                if packet[0] >> 4 != 4 or to == source or source in line.silent:
                    continue
                now = time.monotonic()
                left = max(now, free[source][to]) + 8 * len(packet) / line.bandwidth
                drawn = draw.uniform(-line.jitter, line.jitter)
                due = max(left + max(0.0, line.latency + drawn), last[source][to])
                free[source][to], last[source][to] = left, due
                heapq.heappush(under_way, (due, next(number), source, to, packet))


def _pause(left: float) -> float:
    """How long to sleep for something due in so many seconds: long sleeps end late, by up to half
    a millisecond, so the last one is short."""
    return max(0.0, left - 1e-3 if left > 2e-3 else left)


def _read(tun: int, most: int = 32) -> Iterator[bytes]:
    """What waits in a device, but no more than so many packets: others wait, too."""
    for _ in range(most):
        try:
            yield os.read(tun, 1 << 16)
        except BlockingIOError:
            return


# ------------------------------------------------------------------------------------ the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command in every node; return the first exit status that is not 0."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--relay"]:
        control, *tuns = map(int, arguments[1:])
        _serve(socket.socket(fileno=control), tuns)
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--latency", type=float, default=0.0, help="ms, one way")
    parser.add_argument("--bandwidth", type=float, help="10^6 bits a second")
    parser.add_argument("--jitter", type=float, default=0.0, help="ms to either side")
    parser.add_argument("--seconds", type=float, default=600.0, help="then all is killed")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    if reason := missing():
        print(f"relay: {reason}", file=sys.stderr)
        return 2
    network = Network(
        options.nodes,
        latency_ms=options.latency,
        bandwidth_mbit=options.bandwidth,
        jitter_ms=options.jitter,
    )
    until = time.monotonic() + options.seconds
    with network:
        running = [network.start(node, options.command) for node in range(options.nodes)]
        try:
            ended = [process.wait(max(0.0, until - time.monotonic())) for process in running]
        except subprocess.TimeoutExpired:
            print(f"relay: killed after {options.seconds:g} s", file=sys.stderr)
            return 124
    return next(filter(None, ended), 0)


if __name__ == "__main__":
    sys.exit(main())
