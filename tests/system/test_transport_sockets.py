"""Listeners, connections and addresses."""

import contextlib
import os
import select
import shutil
import socket
import subprocess
import sys
import time

import pytest
from ends import CLIENT_END, STAGE_END, background, make
from hypothesis import given
from hypothesis import strategies as st
from processes import ROOT

from transport.channel import Address, Channel, Deadlines, Listener, receive_all
from transport.errors import (
    Abandoned,
    AddressError,
    LimitError,
    TimedOut,
    TransportError,
    Unreachable,
)
from transport.sockets import connect


def test_a_listener_and_connect():
    with Listener(Address.parse("tcp://127.0.0.1:0")) as listener:
        assert listener.address.port != 0
        client = background(Channel.connect, listener.address, CLIENT_END)
        sock, peer = listener.accept()
        assert Address.parse(peer).host == "127.0.0.1"
        with Channel.accept(sock, STAGE_END) as b, client.join() as a:
            a.send({"n": 1})
            assert b.receive(5.0) == {"n": 1}
        waiting = background(listener.accept)
        time.sleep(0.05)
        listener.close()
        assert waiting.join() is None
        assert listener.accept() is None


def test_a_listener_that_a_parent_hands_down():
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    with Listener(server.detach()) as listener:
        assert str(listener.address) == f"tcp://127.0.0.1:{port}"
        with pytest.raises(Unreachable, match="in use"):
            Listener(listener.address)
    one, two = socket.socketpair()
    for fd in (one.fileno(), 999_999, -1):
        with pytest.raises(AddressError, match="listening"):
            Listener(fd)
    one.sendall(b"still open")
    one.close()
    two.close()


def test_a_listener_that_was_handed_down_leaves_the_socket_listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(2):
            listener = Listener(os.dup(server.fileno()))
            waiting = background(listener.accept)
            listener.close()
            assert waiting.join() is None
        with socket.create_connection(server.getsockname(), timeout=60) as one:  # and its queue is whole
            with Listener(os.dup(server.fileno())) as listener:
                accepted, _ = listener.accept()
            with accepted:
                one.sendall(b"x")
                accepted.settimeout(60)
                assert accepted.recv(1) == b"x"


def test_nobody_there_is_unreachable_and_silence_times_out():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        silent = Address("tcp", "127.0.0.1", port)
        with pytest.raises(TimedOut, match=r"did not finish the handshake in 0\.1 s"):
            Channel.connect(silent, CLIENT_END, deadlines=Deadlines(handshake=0.1))
    with pytest.raises(Unreachable, match="refused"):
        Channel.connect(silent, CLIENT_END)
    for text in ("tcp://host.invalid:1", "tcp://127.0.0.1:0", "vsock://4294967294:1"):
        with pytest.raises(TransportError, match=text.replace("[", "")):
            Channel.connect(Address.parse(text), CLIENT_END, deadlines=Deadlines(connect=0.5))


@contextlib.contextmanager
def dead(host="127.0.0.1", port=0):
    """A port that answers nothing: its queue is full."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server((host, port), backlog=0))
        while True:
            sock = stack.enter_context(socket.socket())
            sock.settimeout(0.5)
            try:
                sock.connect(server.getsockname())
            except TimeoutError:
                break
        yield server.getsockname()


def test_a_dead_address_of_a_name_costs_the_others_a_moment(monkeypatch):
    with dead() as one, dead() as two, socket.create_server(("127.0.0.1", 0)) as server:
        closed = ("127.0.0.1", 1)
        places = [one, closed, two, server.getsockname(), one]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 0, 0, "", at) for at in places])
        start = time.monotonic()
        with connect(Address.parse("tcp://name:1"), 60.0) as sock:
            assert sock.getpeername() == server.getsockname()
        assert time.monotonic() - start < 20  # the first alone would have taken 60
        places[:] = [one, closed]
        with pytest.raises(TimedOut, match="name:1 did not answer"):
            connect(Address.parse("tcp://name:1"), 0.5)
        places[:] = [closed, closed]
        with pytest.raises(Unreachable, match="refused"):
            connect(Address.parse("tcp://name:1"), 60.0)
        places.clear()
        with pytest.raises(Unreachable, match="has no address"):
            connect(Address.parse("tcp://name:1"), 60.0)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, for a resolver of its own"
)
@pytest.mark.parametrize("hosts", [("127.0.0.1", "127.0.0.2"), ("127.0.0.2", "127.0.0.1")])
def test_a_script_reaches_a_name_whose_first_address_is_dead(hosts, tmp_path):
    (tmp_path / "hosts").write_text("".join(f"127.0.0.{last} two-places.test\n" for last in (1, 2)))
    with socket.create_server((hosts[0], 0)) as server, dead(hosts[1], server.getsockname()[1]) as (_, port):
        code = f"""
import socket, time
from transport.address import Address
from transport.sockets import connect
print(len(socket.getaddrinfo("two-places.test", {port}, type=socket.SOCK_STREAM)), flush=True)
start = time.monotonic()
print(connect(Address.parse("tcp://two-places.test:{port}"), 60.0).getpeername()[0], time.monotonic() - start < 20)
"""
        own = f'mount --bind "{tmp_path}/hosts" /etc/hosts && exec "$0" -c "$1"'
        command = ["unshare", "--mount", "sh", "-c", own, sys.executable, code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no mount namespace here")
    assert done.stdout.split() == ["2", hosts[0], "True"], done.stderr


def test_where_there_is_no_poll_links_work_and_a_peer_that_leaves_is_noticed(monkeypatch):
    monkeypatch.delattr(select, "poll")
    a, b = make()
    asker, asking = make()
    waiting = background(b.receive, 60.0, asker=asker)
    a.send({"rows": bytes(4 << 20)})
    assert len(waiting.join()["rows"]) == 4 << 20
    assert not asker.gone()
    waiting = background(b.receive, 60.0, asker=asker)
    asking.abort()
    with pytest.raises(Abandoned):
        waiting.join()
    assert asker.gone()
    with pytest.raises(TimedOut):
        b.receive(0.01)
    with Listener(Address.parse("tcp://127.0.0.1:0")) as listener:
        connecting = background(connect, listener.address, 60.0)
        listener.accept()[0].close()
        connecting.join().close()
    for end in (a, b, asker):
        end.abort()
    assert b.gone()


@pytest.mark.parametrize("how", ["import select; del select.poll", "import eventlet; eventlet.monkey_patch()"])
def test_a_pipeline_works_in_a_program_that_takes_poll_away(how):
    if "eventlet" in how:
        pytest.importorskip("eventlet")
    code = f"""
{how}
import minigpt
with minigpt.Pipeline.local("tiny", stages=2, threads=1) as pipeline:
    print(len(list(pipeline.generate("The capital of France is", max_tokens=8))))
"""
    words = [sys.executable, "-W", "ignore", "-c", code]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300).stdout == "8\n"


def test_receive_all_takes_one_connection_up_to_its_end():
    def give(address, data):
        with socket.create_connection((address.host, address.port)) as sock:
            sock.sendall(data)

    with Listener(Address.parse("tcp://127.0.0.1:0")) as listener:
        for data, limit in ((b"x" * 1000, 1000), (b"", 10)):
            giver = background(give, listener.address, data)
            assert receive_all(listener.accept()[0], limit, 60.0) == data
            giver.join()
        giver = background(give, listener.address, b"x" * 1001)
        with pytest.raises(LimitError, match="more than 1000"):
            receive_all(listener.accept()[0], 1000, 60.0)
        with contextlib.suppress(OSError):
            giver.join()
        with connect(listener.address, 60.0), pytest.raises(TimedOut, match="did not finish"):
            receive_all(listener.accept()[0], 1000, 0.1)


def test_waiting_for_a_connection_has_a_deadline_where_it_is_given_one():
    listener = Listener(Address.parse("tcp://127.0.0.1:0"))
    with listener, pytest.raises(TimedOut, match=f"nobody connected to {listener.address}"):
        listener.accept(time.monotonic() + 0.1)


@pytest.mark.parametrize(
    "text",
    [
        "tcp://127.0.0.1:5000",
        "tcp://[::1]:5000",
        "tcp://stage-0.example.org:65535",
        "tcp://localhost:0",
        "vsock://16:5000",
        "vsock://4294967295:4294967295",
        "tcp://a:1",
        "tcp://1a:1",
    ],
)
def test_an_address_is_written_as_it_was_read(text):
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp://",
        "tcp://:5000",
        "tcp://host",
        "tcp://host:",
        "tcp://host:65536",
        "tcp://host:-1",
        "tcp://host:+1",
        "tcp://host:05",
        "tcp://host:1 ",
        " tcp://host:1",
        "tcp://host:1\n",
        "tcp://host:٣",
        "TCP://host:1",
        "udp://host:1",
        "tcp://ho st:1",
        "tcp://-host:1",
        "tcp://host-:1",
        "tcp://ho_st:1",
        "tcp://a..b:1",
        "tcp://1.2.3:1",
        "tcp://127.1:1",
        "tcp://010.0.0.1:1",
        "tcp://1.2.3.256:1",
        "tcp://::1:1",
        "tcp://[::1:1",
        "tcp://[fe80::1%eth0]:1",
        "tcp://[1.2.3.4]:1",
        "tcp://[zz]:1",
        "tcp://user@host:1",
        "tcp://host:1/",
        "vsock://host:1",
        "vsock://[16]:1",
        "vsock://16",
        "vsock://-1:1",
        "vsock://016:1",
        "vsock://4294967296:1",
        "vsock://1:4294967296",
        "tcp://" + "a" * 64 + ":1",
        "tcp://" + "a." * 200 + "b:1",
    ],
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(AddressError, match="address"):
        Address.parse(text)
    assert issubclass(AddressError, ValueError)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tcp://ho_st:1", "no underscore: use its IP address, or give it another name"),
        ("tcp://host.:1", "leave out the dot at its end"),
        ("tcp://[fe80::1%eth0]:1", r"a scope id \(%eth0\) is one machine's: use another address"),
    ],
)
def test_an_address_that_is_nearly_one_is_told_what_to_change(text, reason):
    with pytest.raises(AddressError, match=reason):
        Address.parse(text)


@given(st.text(max_size=60) | st.from_regex(r"(tcp|vsock)://[\[\]a-f0-9:.-]{0,20}:[0-9]{0,6}", fullmatch=True))
def test_any_text_is_an_address_or_an_address_error(text):
    try:
        address = Address.parse(text)
    except AddressError:
        return
    assert Address.parse(str(address)) == address
