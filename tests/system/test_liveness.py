"""A peer that is gone without a word is noticed: a network that drops everything, a process that is stopped."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
from ends import tcp_pair
from processes import ROOT

from transport.sockets import Wire


def test_a_tcp_connection_is_given_up_by_the_system_within_20_s() -> None:
    one, two = tcp_pair()
    for sock in (one, two):
        wire = Wire(sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        wanted = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2}
        for name, value in (wanted | {"TCP_USER_TIMEOUT": 15_000}).items():
            if hasattr(socket, name):
                assert sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value, name
        wire.close()


def test_a_socket_that_is_no_tcp_socket_has_no_such_options() -> None:
    one, two = socket.socketpair()
    wire = Wire(one)
    two.sendall(b"x")
    assert wire.read(1) == b"x"
    wire.close()
    two.close()


# Two machines, as far as the network is concerned: network namespaces, and a cable between them. Then each takes the
# other's address for that of a card that is not there: everything is sent, and nothing arrives.
FAR = """
import subprocess, sys, threading, time
from ends import STAGE_END
from transport.address import Address
from transport.channel import Channel, Listener

def ip(words):
    subprocess.run(["ip", *words.split()], check=True)

print("here", flush=True)
sys.stdin.readline()
ip("addr add 10.9.0.2/24 dev far")
ip("link set far up")
with Listener(Address.parse("tcp://10.9.0.2:0")) as listener:
    print(listener.address, flush=True)
    channels = [Channel.accept(listener.accept()[0], STAGE_END) for _ in range(2)]
sys.stdin.readline()
ip("neigh replace 10.9.0.1 lladdr 02:00:00:00:00:99 dev far nud permanent")
print("cut", flush=True)
sys.stdin.readline()
"""
NEAR = """
import subprocess, sys, threading, time
from ends import CLIENT_END
from transport.address import Address
from transport.channel import Channel
from transport.errors import TransportError

def ip(words):
    subprocess.run(["ip", *words.split()], check=True)

def noticed(channel, name):
    start = time.monotonic()
    try:
        channel.receive(120.0)
    except TransportError as error:
        print(name, type(error).__name__, round(time.monotonic() - start, 1), flush=True)

far = subprocess.Popen(["unshare", "--net", sys.executable, "-c", sys.argv[1]],
                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
try:
    assert far.stdout.readline() == "here\\n"
    ip("link add near type veth peer name far")
    ip(f"link set far netns {far.pid}")
    ip("addr add 10.9.0.1/24 dev near")
    ip("link set near up")
    print("", file=far.stdin, flush=True)
    address = Address.parse(far.stdout.readline().strip())
    channels = [Channel.connect(address, CLIENT_END) for _ in range(2)]
    print("", file=far.stdin, flush=True)
    assert far.stdout.readline() == "cut\\n"
    ip("neigh replace 10.9.0.2 lladdr 02:00:00:00:00:99 dev near nud permanent")
    channels[1].send({"n": 1})
    waiting = [threading.Thread(target=noticed, args=pair) for pair in zip(channels, ("idle", "unanswered"))]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join()
finally:
    far.kill()
    far.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for networks of its own")
@pytest.mark.skipif(not (shutil.which("unshare") and shutil.which("ip")), reason="needs unshare(1) and ip(8)")
def test_a_connection_that_is_dropped_in_silence_is_noticed() -> None:
    made = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "near", "type", "veth", "peer", "name", "far"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"no network namespaces, or no virtual cable between them: {made.stderr.strip()}")
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", NEAR, FAR],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    lines = [line.split() for line in done.stdout.splitlines()]
    assert sorted((name, kind) for name, kind, _ in lines) == [("idle", "Truncated"), ("unanswered", "Truncated")], (
        done.stdout + done.stderr
    )
    assert all(8 < float(seconds) < 40 for *_, seconds in lines), done.stdout  # 15 and 15 to 20, on a machine with time
