"""Many clients of one local pipeline, for minutes: `python scripts/bench/soak.py --clients 64 --minutes 10`.

Each client asks again and again, for texts of random lengths after prompts of random lengths, and does one of these:

    compare     reads one of a fixed set of greedy texts, and compares it with the one computed alone
    whole       reads a text to its end
    cancel      cancels in the middle, and asks for another text over the same link
    stall       reads nothing for some seconds in the middle, and then the rest
    disconnect  leaves in the middle without a word

Every request must end with its text or with an accurate error: "busy" is one, since a pipeline has only so many places.
With --kill S, every S seconds or so a stage is killed (kill -9), or stopped for up to 20 seconds. Answers must then go
on; that stages died twice during one, or that the link of a client that has no other was lost, are accurate errors too.

Stages must stay as they are: the median of their memory (RSS), threads and descriptors in the last quarter of the time
is compared with that in the second. It exits with code 1, and says why, if

    - a request ended in any other way, or did not end within --patience;
    - more than --differ of the compared texts differ. Sequences that are computed together differ in their last bits
      from one that is computed alone, which decides a near tie;
    - a stage died, or its memory, threads or descriptors grew more than --memory, --threads or --descriptors allow; or,
      with --kill, those of this process, the client.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, whatever is installed

import minigpt  # before NumPy, whose threads it sets
from minigpt.client.text import make_request
from minigpt.errors import MessageError, RequestRefused, StageError, UntrustedStage
from minigpt.protocol import links
from minigpt.protocol.links import StageLink
from minigpt.protocol.messages import Done, Tokens
from minigpt.protocol.request import Options, Replies
from transport.channel import Deadlines

KINDS = {"compare": 4, "whole": 4, "cancel": 2, "stall": 1, "disconnect": 1}  # and how often each, of 12
FIXED = 16  # prompts whose texts are compared
STALL = 3.0  # seconds at most
AGAIN = 0.1  # seconds after which a client that found no place asks again
STOPPED = 20.0  # seconds at most for which a stage is stopped: it counts as dead after 15


class Sample(NamedTuple):
    """One look at a process."""

    memory: int  # bytes, resident
    threads: int
    descriptors: int | None  # None where this user may not count them: a stage hides from others of its own user


Tolerance = Callable[[float], float]  # the most that is allowed in the end, by what there was before


def look(pid: int) -> Sample:
    """Raises OSError if the process is gone, or has ended and nobody has collected it yet: then it has no memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    if "VmRSS" not in fields:
        raise ProcessLookupError(f"process {pid} has ended")
    try:
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    except PermissionError:
        descriptors = None
    return Sample(1024 * int(fields["VmRSS"].split()[0]), int(fields["Threads"]), descriptors)


def quarters(values: Sequence[float]) -> tuple[float, float]:
    """The medians of the second and of the last quarter."""
    size = len(values) // 4
    return statistics.median(values[size : 2 * size]), statistics.median(values[-size:])


class Clients:
    """All clients, and what became of their requests."""

    def __init__(self, pipeline: minigpt.Pipeline, options: argparse.Namespace) -> None:
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []  # of those that did not end as they may
        self.tokens = 0
        self.differ = 0
        self.compared = 0
        self.slowest = 0.0  # seconds that a request took
        self._pipeline = pipeline
        self._patience = options.patience
        self._killed = options.kill > 0
        self._until = 0.0
        self._lock = threading.Lock()
        self._asked: dict[int, float] = {}  # when each client's request began that has not ended
        chance = random.Random(options.seed)
        self._fixed = [self._prompt(chance) for _ in range(FIXED)]
        self._lengths = [chance.randint(1, 60) for _ in self._fixed]
        self._alone = [self._read(index) for index in range(FIXED)]
        self._threads = [
            threading.Thread(target=self._run, args=(number, random.Random(f"{options.seed} {number}")), daemon=True)
            for number in range(options.clients)
        ]

    def start(self, seconds: float) -> None:
        """They ask for so long."""
        self._until = time.monotonic() + seconds
        for thread in self._threads:
            thread.start()

    @property
    def hung(self) -> list[float]:
        """For how long the requests have been under way that should have ended."""
        with self._lock:
            waits = [time.monotonic() - began for began in self._asked.values()]
        return [wait for wait in waits if wait > self._patience]

    def join(self) -> bool:
        """Lets all end, and waits for them; False if one does not end in time."""
        self._until = 0.0
        until = time.monotonic() + self._patience
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _prompt(self, chance: random.Random) -> list[int]:
        """Mostly short, sometimes up to half of the positions."""
        config = self._pipeline.config
        length = chance.randint(1, chance.choice([32, 32, config.n_positions // 2]))
        return [chance.randrange(config.vocab_size) for _ in range(length)]

    def _read(self, index: int) -> list[int]:
        """The fixed text with this number."""
        tokens = self._pipeline.generate(self._fixed[index], max_tokens=self._lengths[index], draft=0)
        return [token.id for token in tokens]

    def _run(self, number: int, chance: random.Random) -> None:
        kinds, weights = list(KINDS), list(KINDS.values())
        while time.monotonic() < self._until:
            (kind,) = chance.choices(kinds, weights)
            began = time.monotonic()
            with self._lock:
                self._asked[number] = began
            failure, pause = "", 0.0
            try:
                outcome = getattr(self, f"_{kind}")(chance)
            except Exception as error:  # whatever it is, it is counted
                accurate = self._accurate(kind, error)
                outcome = accurate or type(error).__name__
                failure = "" if accurate else f"{kind}: {outcome}: {error}"
                pause = AGAIN
            with self._lock:
                del self._asked[number]
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.outcomes[outcome] += 1
                if failure:
                    self.failures.append(failure)
            time.sleep(pause)

    def _accurate(self, kind: str, error: Exception) -> str:
        """What an error says, if a request may end with it; otherwise ""."""
        if isinstance(error, RequestRefused):
            return error.reason if error.reason == "busy" else ""
        if not self._killed or not isinstance(error, StageError) or isinstance(error, MessageError | UntrustedStage):
            return ""
        if kind in ("stall", "disconnect"):  # by a bare link, which nobody makes again
            return "link lost"
        return "died twice" if "has died 2 times" in str(error) else ""

    def _count(self, tokens: int) -> None:
        with self._lock:
            self.tokens += tokens

    def _compare(self, chance: random.Random) -> str:
        index = chance.randrange(FIXED)
        found = self._read(index)
        self._count(len(found))
        with self._lock:
            self.compared += 1
            self.differ += found != self._alone[index]
        return "text"

    def _whole(self, chance: random.Random) -> str:
        prompt, most = self._prompt(chance), chance.randint(1, 100)
        generation = self._pipeline.generate(prompt, max_tokens=most, temperature=1.0, seed=chance.getrandbits(32))
        self._count(len(list(generation)))  # a generation ends only where its request says, or raises
        return "text"

    def _cancel(self, chance: random.Random) -> str:
        generation = self._pipeline.generate(self._prompt(chance), max_tokens=100, temperature=1.0)
        for _ in range(chance.randint(1, 20)):
            if next(generation, None) is None:
                return "text"
        generation.close()
        return "cancelled"

    def _stall(self, chance: random.Random) -> str:
        link, replies = self._asking(chance)
        try:
            ended = self._some(link, replies, chance)
            time.sleep(STALL * chance.random())
            while not ended:
                ended = self._next(link, replies)
            return "text after a stall"
        finally:
            link.channel.close()

    def _disconnect(self, chance: random.Random) -> str:
        link, replies = self._asking(chance)
        try:
            self._some(link, replies, chance)
        finally:
            link.channel.abort()
        return "disconnected"

    def _asking(self, chance: random.Random) -> tuple[StageLink, Replies]:
        """A link outside the pool, over which a text has been asked for."""
        manifest, config = self._pipeline.manifest, self._pipeline.config
        deadlines = Deadlines(connect=self._patience, handshake=self._patience)
        channel = links.dial(manifest, self._pipeline.addresses, 0, links.calling_end(manifest, 0, None), deadlines)
        link = StageLink(channel, manifest, 0, self._patience)
        try:
            options = Options(max_tokens=100, temperature=1.0, seed=chance.getrandbits(32))
            request = make_request(self._prompt(chance), None, config, options)
            link.send(request)
        except BaseException:
            channel.abort()
            raise
        return link, Replies(request, config, len(manifest.stages))

    def _some(self, link: StageLink, replies: Replies, chance: random.Random) -> bool:
        """Reads a few messages; whether the text has come to its end."""
        return any(self._next(link, replies) for _ in range(chance.randint(0, 10)))

    def _next(self, link: StageLink, replies: Replies) -> bool:
        """Reads one message, and checks it; whether it was the last."""
        message = link.receive()
        replies.take(message)
        if isinstance(message, Tokens):
            self._count(len(message.ids))
        return isinstance(message, Done)


def grown(name: str, values: Sequence[float], allowed: Tolerance, unit: float = 1) -> tuple[str, bool]:
    """What became of a figure, in words, and whether that is more than is allowed."""
    before, after = quarters(values)
    words = f"{name} {before / unit:.1f} → {after / unit:.1f} (most {max(values) / unit:.1f})"
    return words, after > allowed(before)


class Trouble:
    """Kills and stops stages, until it is told to end."""

    def __init__(self, pipeline: minigpt.Pipeline, every: float, chance: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self._pipeline = pipeline
        self._every = every
        self._chance = chance
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(self._every * self._chance.uniform(0.5, 1.5)):
            victim = self._chance.choice(self._pipeline.pids)
            with suppress(ProcessLookupError):
                if self._chance.random() < 0.75:
                    os.kill(victim, signal.SIGKILL)
                    self.counts["killed"] += 1
                else:
                    os.kill(victim, signal.SIGSTOP)
                    self._ended.wait(self._chance.uniform(1.0, STOPPED))
                    os.kill(victim, signal.SIGCONT)
                    self.counts["stopped"] += 1

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def soak(options: argparse.Namespace) -> list[str]:
    """Prints the summary; returns what is wrong."""
    wrong = []
    watched = ["this process"] if options.kill else [f"stage {index}" for index in range(options.stages)]
    samples: list[list[Sample]] = [[] for _ in watched]
    with minigpt.Pipeline.local(
        options.model, options.stages, timeout=options.patience, connections=options.clients
    ) as pipeline:
        clients = Clients(pipeline, options)
        seconds = 60 * options.minutes
        began = time.monotonic()
        clients.start(seconds)
        print(f"{options.clients} clients of {options.stages} stages ask for {seconds:.0f} s", flush=True)
        hung: list[float] = []
        trouble = Trouble(pipeline, options.kill, random.Random(options.seed)) if options.kill else None
        while (left := began + seconds - time.monotonic()) > 0 and not hung:
            pids = [os.getpid()] if options.kill else pipeline.pids
            if _died(pipeline) and not options.kill:
                break
            for found, pid in zip(samples, pids, strict=True):
                with suppress(OSError):  # it has died this moment
                    found.append(look(pid))
            time.sleep(min(options.every, left))
            hung = clients.hung
        if trouble is not None:
            trouble.end()
            print("stages " + " and ".join(f"{how} {count} times" for how, count in trouble.counts.items()))
        if not clients.join() or hung:
            wrong.append(f"requests did not end within {options.patience:.0f} s")
        took = time.monotonic() - began
        dead = [] if options.kill else _died(pipeline)
        wrong += [f"stage {stage} has died" for stage in dead] or _after(pipeline)
        pids = pipeline.pids
    if left := [pid for pid in pids if _runs(pid)]:
        wrong.append(f"{len(left)} stages were left behind")
    outcomes = Counter(clients.outcomes)  # a client that hung may still end
    counted = ", ".join(f"{count} {kind}" for kind, count in outcomes.most_common())
    print(f"{took:.0f} s: {outcomes.total()} requests, {clients.tokens} tokens, {clients.tokens / took:.1f} tokens/s")
    print(f"ended by: {counted}; the slowest took {clients.slowest:.1f} s")
    print(f"compared with texts computed alone: {clients.compared}, of which {clients.differ} differ")
    for failure, count in Counter(clients.failures).most_common(10):
        wrong.append(f"{count} × {failure}")
    if clients.differ > options.differ * clients.compared:
        wrong.append(f"{clients.differ} of {clients.compared} texts differ, allowed are {100 * options.differ:g} %")
    if not clients.compared:
        wrong.append("no text was compared: give it more minutes")
    for name, looks in zip(watched, samples, strict=True):
        if len(looks) < 8:
            wrong.append(f"{name} was looked at {len(looks)} times, wanted at least 8: give it more minutes")
            continue
        figures = [
            grown("memory MB", [one.memory for one in looks], lambda was: was * (1 + options.memory), 1e6),
            grown("threads", [one.threads for one in looks], lambda was: was + options.threads),
        ]
        counts = [one.descriptors for one in looks if one.descriptors is not None]
        if len(counts) == len(looks):
            figures.append(grown("descriptors", counts, lambda was: was + options.descriptors))
        else:
            figures.append(("descriptors may not be counted", False))
        print(f"{name}: " + ", ".join(words for words, _ in figures))
        wrong += [f"{name} grew: {words}" for words, more in figures if more]
    return wrong


def _runs(pid: int) -> bool:
    with suppress(OSError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def _died(pipeline: minigpt.Pipeline) -> list[int]:
    """The stages that have died, though they may be there again."""
    state = enumerate(zip(pipeline.pids, pipeline.restarts, strict=True))
    return [stage for stage, (pid, restarts) in state if restarts or not _runs(pid)]


def _after(pipeline: minigpt.Pipeline) -> list[str]:
    """What is wrong once all clients have gone."""
    try:
        return [f"stage {report.stage}: {report.error}" for report in pipeline.status() if report.error]
    except StageError as error:
        return [f"stage 0: {error}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64, help="how many at once (64)")
    parser.add_argument("--minutes", type=float, default=10.0, help="for how long they ask (10)")
    parser.add_argument("--stages", type=int, default=2, help="of the pipeline (2)")
    parser.add_argument("--model", default="tiny", help="the checkpoint (tiny)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and kinds (0)")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks at the stages (2)")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds that a request may take (120)")
    parser.add_argument("--differ", type=float, default=0.05, help="share of compared texts that may differ (0.05)")
    parser.add_argument("--kill", type=float, default=0.0, help="seconds between two deaths of stages (0: none dies)")
    parser.add_argument("--memory", type=float, default=0.1, help="share by which memory may grow (0.1)")
    parser.add_argument("--threads", type=int, default=4, help="by how many threads may grow (4)")
    parser.add_argument("--descriptors", type=int, default=4, help="by how many descriptors may grow (4)")
    options = parser.parse_args()
    # Each client may have a link in the pool, and one of its own; and all of them may be made at once.
    for name in ("MINIGPT_MAX_CHANNELS", "MINIGPT_MAX_HANDSHAKES"):
        os.environ.setdefault(name, str(2 * options.clients + 8))
    wrong = soak(options)
    print("\n".join(f"WRONG: {line}" for line in wrong) or "all as it should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
