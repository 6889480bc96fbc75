"""The link with delay: how long it takes, what it lets through, and that nothing of it is left.

Delay is what the relay is for, so it is the one thing here that is measured on a clock: nothing may
ever arrive early, and late by no more than what a wake-up takes, which a busy machine lets be seen
once in a while: it is tried until it is.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import relay

SCRIPT = relay.__file__
needs_network = pytest.mark.skipif(relay.missing() is not None, reason=str(relay.missing()))


@contextlib.contextmanager
def connected(network):
    """A connection from node 0 to node 1, both ends in this process."""
    with contextlib.ExitStack() as opened:
        with network.inside(1):
            listening = opened.enter_context(socket.create_server((network.addresses[1], 5000)))
        with network.inside(0):
            near = opened.enter_context(
                socket.create_connection((network.addresses[1], 5000), timeout=20)
            )
        far = opened.enter_context(listening.accept()[0])
        far.settimeout(20)
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield near, far


def receive(end, size):
    got = 0
    while got < size:
        part = end.recv(1 << 20)
        assert part
        got += len(part)


def round_trip(near, far):
    """Seconds."""
    start = time.monotonic()
    near.sendall(b"there")
    receive(far, 5)
    far.sendall(b"back")
    receive(near, 4)
    return time.monotonic() - start


def best(measure, most, tries=12):
    """The least of so many tries, and of up to a hundred times as many until it is no more than
    the most."""
    least, made = math.inf, 0
    while made < tries or (least > most and made < 100 * tries):
        least, made = min(least, measure()), made + 1
    return least


def seconds_for(near, far, size):
    """How long so many bytes take from the first that is sent to the last that arrives."""
    start = time.monotonic()
    sender = threading.Thread(target=near.sendall, args=(bytes(size),))
    sender.start()
    receive(far, size)
    sender.join()
    return time.monotonic() - start


@needs_network
def test_a_round_trip_takes_twice_the_latency_and_that_can_be_changed():
    with relay.Network(2, latency_ms=3) as network, connected(network) as (near, far):
        for latency in (3e-3, 20e-3, 0.0):
            network.change(latency_ms=latency * 1e3)
            late = 2 * latency + 1.5e-3
            assert 2 * latency <= best(lambda: round_trip(near, far), late) <= late


@needs_network
def test_jitter_is_up_to_what_was_said_to_either_side():
    with relay.Network(2, latency_ms=20, jitter_ms=10) as network, connected(network) as ends:
        taken = [round_trip(*ends) for _ in range(25)]
    assert min(taken) >= 2 * 10e-3
    assert min(taken) < 2 * 20e-3 < max(taken)  # of 25 even draws all on one side: 1 in 10^7


@needs_network
@pytest.mark.parametrize("megabits", [20, 200])
def test_bytes_take_their_bits_over_the_bandwidth(megabits):
    size = megabits * 25_000  # 0.2 s
    with relay.Network(2, bandwidth_mbit=megabits) as network, connected(network) as ends:
        taken = best(lambda: seconds_for(*ends, size), 1.15 * 0.2, tries=4)
        before = network.carried()
        network.change(bandwidth_mbit=float("inf"))
        seconds_for(*ends, size)
        after = network.carried()
    assert 0.2 <= taken <= 1.15 * 0.2
    assert size <= after[0][1] - before[0][1] <= 1.05 * size
    assert after[0][0] == after[1][1] == 0


@needs_network
def test_all_pairs_of_nodes_are_joined_and_none_with_the_world():
    with relay.Network(3) as network:
        for here in range(3):
            with network.inside(here):
                assert {name for _, name in socket.if_nameindex()} == {"lo", relay.DEVICE}
                server = socket.create_server((network.addresses[here], 6000))
            with server:
                for there in range(3):
                    with network.inside(there):
                        client = socket.create_connection((network.addresses[here], 6000), 10)
                    with client, server.accept()[0] as accepted:
                        assert accepted.getpeername()[0] == network.addresses[there]
            with network.inside(here), pytest.raises(OSError, match="unreachable"):
                socket.create_connection(("192.0.2.1", 80), 10)


@needs_network
def test_a_silenced_node_says_nothing_and_goes_on_when_it_is_restored():
    with relay.Network(2) as network, connected(network) as (near, far):
        round_trip(near, far)
        network.silence(1)
        near.sendall(b"lost, and sent again")
        far.settimeout(0.3)
        with pytest.raises(TimeoutError):
            far.recv(1)
        network.restore(1)
        far.settimeout(20)
        receive(far, len("lost, and sent again"))


def open_namespaces():
    """Inodes of all network namespaces that a process is in or has open."""
    found = set()
    for link in (*Path("/proc").glob("[0-9]*/ns/net"), *Path("/proc").glob("[0-9]*/fd/*")):
        with contextlib.suppress(OSError):
            if (target := os.readlink(link)).startswith("net:["):
                found.add(int(target[5:-1]))
    return found


def here():
    return os.readlink("/proc/thread-self/ns/net"), sorted(socket.if_nameindex())


@needs_network
def test_nothing_is_left_after_an_exception():
    before = here()
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with pytest.raises(KeyError), relay.Network(2) as network:
        made = {os.fstat(namespace).st_ino for namespace in network._namespaces}
        started = network.start(0, [sys.executable, "-c", sleeper], stdin=subprocess.PIPE)
        while len(list(network._inhabitants())) < 2:  # it, and its child
            time.sleep(0.01)
        assert made <= open_namespaces()
        with network.inside(1):
            raise KeyError
    assert started.stdin.closed
    assert started.returncode == -signal.SIGKILL
    assert network._relay.returncode is not None
    assert not made & open_namespaces()
    assert here() == before


@needs_network
def test_nothing_is_left_when_its_owner_is_killed():
    owner = (
        "import os, relay\n"
        "with relay.Network(2) as network:\n"
        "    print(*(os.fstat(n).st_ino for n in network._namespaces), flush=True)\n"
        "    input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", owner],
        cwd=Path(SCRIPT).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        made = set(map(int, process.stdout.readline().split()))
        assert len(made & open_namespaces()) == 2
        process.kill()
    for _ in range(1000):
        if not made & open_namespaces():
            return
        time.sleep(0.01)
    pytest.fail("a namespace is still open")


@needs_network
def test_a_relay_that_ended_is_an_error():
    with relay.Network(1) as network:
        network._relay.kill()
        with pytest.raises(OSError, match="the relay has ended with status -9"):
            network.change(latency_ms=1)


@needs_network
def test_the_command_runs_once_in_each_node():
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")
    # A line in one write: the two write into the same pipe.
    shown = (
        f"import json, os; shown = {{name: os.environ[name] for name in {names}}}\n"
        "os.write(1, json.dumps(shown).encode() + b'\\n')"
    )
    done = subprocess.run(
        [sys.executable, SCRIPT, "--nodes", "2", "--", sys.executable, "-c", shown],
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(one.pop("RANK") for one in found) == ["0", "1"]
    same = {"WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": relay.DEVICE}
    assert found == [same, same]


@needs_network
@pytest.mark.parametrize(
    ("code", "seconds", "status"), [("raise SystemExit(3)", "20", 3), ("input()", "0.2", 124)]
)
def test_the_command_ends_with_the_status_of_what_it_ran(code, seconds, status):
    with subprocess.Popen(
        [sys.executable, SCRIPT, "--seconds", seconds, "--", sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.wait() == status


def test_what_is_missing_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert relay.missing() == "network namespaces need root, and this is another user"
    assert relay.main(["true"]) == 2
    assert capsys.readouterr().err == f"relay: {relay.missing()}\n"
    with pytest.raises(OSError, match="need root"), relay.Network(2):
        pass


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(relay, "_TUN", "/dev/net/no-such-device")
    monkeypatch.setattr(relay, "_call", lambda *_: None)
    relay._refused.cache_clear()
    assert "/dev/net/no-such-device" in relay.missing()
    relay._refused.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"nodes": 0}, "nodes must be 1 to 64, not 0"),
        ({"nodes": 2, "latency_ms": -1}, "latency_ms"),
        ({"nodes": 2, "jitter_ms": float("nan")}, "jitter_ms"),
        ({"nodes": 2, "bandwidth_mbit": 0}, "bandwidth_mbit must be above 0, not 0"),
    ],
)
def test_what_no_link_can_do_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        relay.Network(**arguments)
