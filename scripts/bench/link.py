"""What a link between two stages costs, without the stages: `python scripts/bench/link.py`.

Two processes and TCP over loopback, once with each library that may compute the cipher (transport/aead.py) and is
installed. Both ends show mock evidence, and verify it, as link 1 of a pipeline does.

    handshake   one after the other, from the connection until the caller has the answerer's first message: by then both
                ends have accepted the other's evidence. Nothing paces them here; a stage paces its newcomers
    stranger    a first message whose mac is wrong, from the connection until it is hung up on; 50 at once
    message     one direction, as fast as the answerer takes them: 1 MiB, and 3 KiB, a batch of one token of GPT-2 small

The milliseconds of a handshake and of a stranger are the median; those of a message, and all CPU time, are means.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shlex
import statistics
import sys
import time
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, whatever is installed

from attest.measure import measure
from attest.providers.mock import MockKey, MockPins, MockRoot
from minigpt.checkpoint import sources
from minigpt.launch.plan import plan
from minigpt.protocol.links import answering_end, calling_end
from minigpt.protocol.manifest import Manifest
from scripts.bench.peers import machine
from transport.address import Address
from transport.channel import Channel, Listener
from transport.errors import Closed
from transport.link import SUITES, initiate, opening
from transport.sockets import Door
from transport.sockets import connect as connect_to

CIPHERS = {"pycryptodome": "Crypto", "cryptography": "cryptography"}  # values of MINIGPT_AEAD, and what each imports
SIZES = {"1 MiB": 2**20, "3 KiB": 4 * 768}  # bytes of rows in a message
LOOPBACK = "tcp://127.0.0.1:0"
PATIENCE = 60.0  # seconds that the next message, or the other process, may take
STRANGERS = 50  # at once
LONGEST = 3600.0  # seconds for all figures of one cipher and suite


class Side(NamedTuple):
    """What a process needs for its end of link 1."""

    manifest: bytes
    key: str


class Row(NamedTuple):
    what: str
    rate: float  # per second
    megabytes: float | None  # per second
    ms: float
    calling: float  # CPU ms
    answering: float


def sides(suite: int) -> tuple[Side, Side]:
    """The calling one, which is stage 0, and the answering one."""
    root = MockRoot.generate()
    pins = MockPins(root.public, frozenset([measure()]))
    manifest = plan(sources.find(sources.TINY), 2, pins=[pins], suites=[suite])
    until = int(Manifest.parse(manifest).expires.timestamp() * 1000)
    calling, answering = (Side(manifest, MockKey.generate(root, index, until).to_json()) for index in range(2))
    return calling, answering


def answer(side: Side, told: Connection) -> None:
    """Serves one link after the other until it is terminated. It says how much CPU time it has used at the beginning of
    each link, and whenever it is asked, by a message of one part."""
    manifest = Manifest.parse(side.manifest)
    end = answering_end(manifest, 1, manifest.attester(1, side.key.encode()))
    listener = Listener(Address.parse(LOOPBACK))
    door = Door(listener, lambda: opening(end), lambda _peer, _error: None, 1024)
    told.send(str(listener.address))
    while (accepted := door.accept()) is not None:
        with Channel.accept(accepted[0], end, accepted[2]) as channel:
            channel.send([repr(time.process_time()).encode()])
            try:
                while True:
                    if len(channel.receive(PATIENCE)) == 1:
                        channel.send([repr(time.process_time()).encode()])
            except Closed:
                pass


def call(side: Side, address: str, handshakes: int, megabytes: int, told: Connection) -> None:
    """Measures handshakes, and messages if there are megabytes to send."""
    manifest = Manifest.parse(side.manifest)
    end = calling_end(manifest, 1, manifest.attester(0, side.key.encode()))

    def connect() -> tuple[Channel, float]:
        channel = Channel.connect(Address.parse(address), end)
        return channel, float(channel.receive(PATIENCE)[0])

    def ask(channel: Channel) -> float:
        channel.send([b""])
        return float(channel.receive(PATIENCE)[0])

    channel, theirs = connect()  # the first is slower, and does not count
    channel.close()
    taken, began, ours = [], time.perf_counter(), time.process_time()
    for _ in range(handshakes):
        start = time.perf_counter()
        channel, now = connect()
        taken.append(time.perf_counter() - start)
        channel.close()
    seconds, used = time.perf_counter() - began, time.process_time() - ours
    what, each = f"handshake, suite {manifest.suites[0]}", 1000 / handshakes
    median = 1000 * statistics.median(taken)
    rows = [Row(what, handshakes / seconds, None, median, each * used, each * (now - theirs))]

    first = next(initiate(end))
    assert isinstance(first, bytes)
    wrong = first[:-1] + bytes([first[-1] ^ 1])
    waves, handshake, theirs, taken = max(20, handshakes // 4), (now - theirs) / handshakes, now, []
    count = STRANGERS * waves
    began, ours = time.perf_counter(), time.process_time()
    for _ in range(waves):
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            crowd = []
            for _ in range(STRANGERS):
                crowd.append(stack.enter_context(connect_to(Address.parse(address), PATIENCE)))
                crowd[-1].sendall(wrong)
            for sock in crowd:
                with contextlib.suppress(ConnectionError):
                    if sock.recv(1):
                        sys.exit("link.py: a stranger was answered")
        taken.append((time.perf_counter() - start) / STRANGERS)
    seconds, used = time.perf_counter() - began, time.process_time() - ours
    channel, now = connect()  # which costs a handshake, too
    channel.close()
    what, each, median = f"stranger, suite {manifest.suites[0]}", 1000 / count, 1000 * statistics.median(taken)
    rows.append(Row(what, count / seconds, None, median, each * used, each * (now - theirs - handshake)))

    channel, _ = connect()
    for name, size in SIZES.items() if megabytes else ():
        message, count = [b"", b"", b"", os.urandom(size)], max(1, megabytes * 10**6 // size)
        channel.send(message)
        theirs, began, ours = ask(channel), time.perf_counter(), time.process_time()
        for _ in range(count):
            channel.send(message)
        now = ask(channel)  # all have been opened by then
        seconds, used = time.perf_counter() - began, time.process_time() - ours
        each = 1000 / count
        rate = count / seconds
        rows.append(
            Row(f"message, {name}", rate, rate * size / 1e6, each * seconds, each * used, each * (now - theirs))
        )
    channel.close()
    told.send(rows)


def heard(told: Connection, seconds: float) -> object:
    """What a process says, if it does so in time."""
    try:
        if told.poll(seconds):
            return told.recv()
    except EOFError:
        sys.exit("link.py: a process has ended without its figures; its error is above")
    sys.exit(f"link.py: a process said nothing for {seconds:g} s")


def run(cipher: str, suite: int, handshakes: int, megabytes: int) -> list[Row]:
    """The figures of one cipher and suite, from two new processes: a process loads one cipher only."""
    os.environ["MINIGPT_AEAD"] = cipher
    calling, answering = sides(suite)
    context = multiprocessing.get_context("spawn")
    processes = []
    try:
        told, teller = context.Pipe(duplex=False)
        processes.append(context.Process(target=answer, args=(answering, teller), daemon=True))
        processes[-1].start()
        teller.close()
        address = str(heard(told, PATIENCE))
        told, teller = context.Pipe(duplex=False)
        processes.append(
            context.Process(target=call, args=(calling, address, handshakes, megabytes, teller), daemon=True)
        )
        processes[-1].start()
        teller.close()
        rows = heard(told, LONGEST)
        assert isinstance(rows, list)
        return rows
    finally:
        for process in processes:
            process.kill()
            process.join()


def cells(cipher: str, row: Row) -> list[str]:
    megabytes = "–" if row.megabytes is None else f"{row.megabytes:.1f}"
    return [cipher, row.what, f"{row.rate:.1f}", megabytes, *(f"{ms:.3f}" for ms in row[3:])]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--handshakes", type=int, default=50, help="of each suite that count, after one that does not")
    options.add_argument("--megabytes", type=int, default=200, help="of messages of each size")
    options.add_argument("--suite", type=int, choices=sorted(SUITES), help="of the handshakes; by default each")
    given = options.parse_args()
    if given.handshakes < 1 or given.megabytes < 1:
        options.error("--handshakes and --megabytes are 1 or more")
    suites = [given.suite] if given.suite else sorted(SUITES)
    print(f"{machine()}: `python {shlex.join(['scripts/bench/link.py', *sys.argv[1:]])}`\n")
    for line in (
        ["cipher", "", "per second", "MB/s", "ms", "CPU ms calling", "answering"],
        ["---", "---", *["---:"] * 5],
    ):
        print("| " + " | ".join(line) + " |")
    for cipher in (name for name, package in CIPHERS.items() if find_spec(package)):
        for suite in suites:
            megabytes = given.megabytes if suite == suites[-1] else 0  # sealed alike in each suite
            for row in run(cipher, suite, given.handshakes, megabytes):
                print("| " + " | ".join(cells(cipher, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
