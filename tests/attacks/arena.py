"""The pipeline under attack: real stages, a real client's process, and a proxy on every link; and the grading.

    client ── proxy 0 ── stage 0 ── proxy 1 ── stage 1

The manifest names the proxies' ports; the stages listen elsewhere, as the host that starts them pleases. Stages live as
long as the arena, so each attack meets those that survived the ones before; one that must kill them starts its own.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import guests
from nitro.pipeline import Rooted, image
from processes import ROOT, eventually
from tsm.pipeline import pins

import minigpt
from attacks import Seen, Survived, client, require
from attacks.pipeline import Client, EnclavePipes, GuestPipes, Pipes
from attacks.proxy import Rule, Tap, honest
from attest.providers.nitro import NitroPins
from minigpt.checkpoint.sources import read_config
from minigpt.protocol import links
from minigpt.protocol.links import StageLink
from transport.channel import Deadlines

PATIENCE = 20.0  # seconds for what takes milliseconds on a machine that has nothing else to do
FLAGS = ("--answer-timeout", "4", "--handshake-timeout", "5")
INSTANCE = 0x44  # each byte of the PCR4 that is pinned
MORE_PINS: dict[str, dict[str, Any]] = {
    "snp": {"chip_ids": [guests.CHIP.hex()], "min_crl_number": 5},
    "tdx": {"min_crl_numbers": {"root": 1, "pck": 1}},
}
TOKENS = 5  # of a run that is graded
PLAIN_STAGE = client.PLAIN + "\nimport sys\nfrom minigpt.stage.__main__ import main\nsys.exit(main(sys.argv[1:]))"
_VERDICT = re.compile(r"(?:channel (\d+)|newcomer) \(.*?\): (?:ended by )?(\w+)(.*)")


class Arena:
    """What attacks need.

    Args:
        folder: of the checkpoint.
        thorough: every byte and every case, where the short form takes some.
        suite: of the link protocol.

    Attributes:
        ids: of prompts: as many as the model has positions.
        split: of the pipeline, two stages.
        notes: what was measured on the way.
    """

    def __init__(self, folder: Path, *, thorough: bool = True, suite: int = 2) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="hostile-")
        self.where = Path(self._temporary.name)
        self.folder = self.where / folder.name  # a copy: nobody else shall change it meanwhile
        shutil.copytree(folder, self.folder)
        self.thorough = thorough
        self.suite = suite
        self.config = read_config(self.folder)
        half = self.config.n_layer // 2
        self.split = f"{half}+{self.config.n_layer - half}"
        self.model = minigpt.load(str(self.folder))
        span = min(self.config.vocab_size - 1, 2000)
        self.ids = tuple((37 * i * i + 11 * i + 5) % span for i in range(self.config.n_positions))
        self.notes: list[str] = []
        self._known: dict[tuple[Any, ...], list[int]] = {}
        self._made = 0
        self._clients: list[Client] = []
        self._pipes: list[Pipes] = []
        self._enclaves: EnclavePipes | None = None
        self._guests: dict[tuple[str, ...], GuestPipes] = {}
        self.stages: Pipes = self.start()
        self.client = self.start_client()
        self.mark()

    # What runs.

    def start(self, *flags: str, split: str | None = None, run: bool = True, **options: Any) -> Pipes:
        """Another pipeline of its own. It ends with the arena, or when it is closed."""
        self._made += 1
        python = options.pop("python", None)
        where, folder = self.where / str(self._made), options.pop("folder", self.folder)
        made = Pipes(folder, split or self.split, where, **{"suites": [self.suite]} | options)
        self._pipes.append(made)
        if run:
            for index in reversed(range(len(made.ports))):
                made.start(index, *FLAGS, *flags, **({"python": python} if python else {}))
        return made

    @contextmanager
    def enclaves(self) -> Iterator[EnclavePipes]:
        """Meanwhile the pipeline under attack is one of Nitro's stages, which pins an instance (PCR4) too."""
        if self._enclaves is None:
            pins = [Rooted(NitroPins(image(index).pcrs | {4: bytes([INSTANCE]) * 48})) for index in (0, 1)]
            made = EnclavePipes(self.folder, self.split, self.where / "enclaves", suites=[self.suite], pins=pins)
            self._pipes.append(made)
            for index in (1, 0):
                made.device(index, "--pcr", f"4={INSTANCE}")
                made.start(index, *FLAGS)
            self._enclaves = made
        with self.attacked(self._enclaves):
            yield self._enclaves

    @contextmanager
    def guests(self, *kinds: str) -> Iterator[GuestPipes]:
        """Meanwhile it is one of "snp" and "tdx" stages; where both are alike, more is pinned than has to be."""
        if kinds not in self._guests:
            self._guests[kinds] = self.start_guests(*kinds)
        with self.attacked(self._guests[kinds]):
            yield self._guests[kinds]

    def start_guests(self, *kinds: str, flags: Sequence[str] = (), **changes: Any) -> GuestPipes:
        """Another pipeline of such stages. `flags` are their devices'."""
        self._made += 1
        more = MORE_PINS[kinds[0]] if len(set(kinds)) == 1 else {}
        pinned = [pins(kind, index, **more) for index, kind in enumerate(kinds)]
        where = self.where / str(self._made)
        made = GuestPipes(
            self.folder, self.split, where, kinds[0], **{"suites": [self.suite], "pins": pinned} | changes
        )
        self._pipes.append(made)
        (made.endorsements / "crl").write_bytes(guests.revocations(number=5, **guests.EVER))
        for index in reversed(range(len(kinds))):
            made.device(index, "--kind", kinds[index], *flags)
            made.start(index, *FLAGS, endorsed=kinds[index] == kinds[0])
        return made

    @contextmanager
    def attacked(self, pipes: Pipes) -> Iterator[None]:
        """Meanwhile this is the pipeline under attack."""
        usual, self.stages = self.stages, pipes
        try:
            yield
        finally:
            self.stages = usual

    def start_client(self, *flags: str) -> Client:
        """Another client's process."""
        made = Client(*flags)
        self._clients.append(made)
        return made

    def close(self) -> None:
        for made in self._clients:
            made.close()
        for pipes in self._pipes:
            pipes.close()
        self._temporary.cleanup()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What is right.

    def prompt(self, length: int = 9, start: int = 0) -> tuple[int, ...]:
        """Some ids."""
        return self.ids[start : start + length]

    def expected(self, ids: Sequence[int], count: int = TOKENS) -> list[int]:
        """The tokens of an untouched run: those of one process."""
        key = (*ids, count)
        if key not in self._known:
            self._known[key] = [token.id for token in self.model.generate(list(ids), max_tokens=count)]
        return self._known[key]

    def some(self, items: Sequence[Any], most: int) -> Sequence[Any]:
        """All of them in a thorough run; at most so many, spread evenly, in a short one."""
        if self.thorough or len(items) <= most:
            return items
        return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)] if most > 1 else items[:1]

    # What happens.

    def run(
        self,
        rules: dict[int, Rule] | None = None,
        *,
        ids: Sequence[Sequence[int]] | None = None,
        count: int = TOKENS,
        timeout: float = PATIENCE,
        stages: Pipes | None = None,
        client: Client | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """One run of the client, with a rule for the links that are attacked, over fresh connections on every link."""
        self.begin(rules, ids=ids, count=count, timeout=timeout, stages=stages, client=client, **options)
        return (client or self.client).answer(timeout + 60)

    def begin(
        self,
        rules: dict[int, Rule] | None = None,
        *,
        ids: Sequence[Sequence[int]] | None = None,
        count: int = TOKENS,
        timeout: float = PATIENCE,
        stages: Pipes | None = None,
        client: Client | None = None,
        **options: Any,
    ) -> None:
        """As `run`, and does not wait for its end."""
        pipes = stages or self.stages
        for index, proxy in enumerate(pipes.proxies):
            proxy.reset((rules or {}).get(index, honest))
        order = {
            "manifest": str(pipes.path),
            "places": str(pipes.places),
            **pipes.options,
            "timeout": timeout,
        } | options
        requests = [list(one) for one in (ids or [self.prompt()])]
        (client or self.client).order(ids=requests, max_tokens=count, **order)

    def control(self, stages: Pipes | None = None, **options: Any) -> None:
        """An honest run, which must give the right tokens: before an attack its control, after it the proof that the
        stages still serve a new client."""
        answer = self.run(stages=stages, **options)
        require(answer["whole"], f"an honest client failed: {answer['error']}")
        require(answer["tokens"] == [self.expected(self.prompt())], "an honest client got other tokens")

    def assault(
        self,
        rule: Rule,
        *,
        link: int = 0,
        first: str = "",
        ids: Sequence[Sequence[int]] | None = None,
        count: int = TOKENS,
        silent: bool = False,
        control: bool = True,
        **options: Any,
    ) -> Seen:
        """One run with a rule on one link, graded at both ends.

        Args:
            first: the end of that link that must close of its own accord, "I" or "R"; "" for either.
            silent: neither end may send a record: the attack is on the handshake.
            control: let an honest client run after it.

        Raises:
            Survived: the client got anything but a true prefix and an error; an end kept the connection; an honest
                client is not served any more.
        """
        self.mark()
        answer = self.run({link: rule}, ids=ids, count=count, **options)
        seen = self.grade(answer, ids or [self.prompt()], count)
        taps = self.stages.proxies[link].taps
        require(taps, f"nothing was said on link {link}: no attack took place")
        tap = taps[0]
        require(eventually(lambda: tap.dead, PATIENCE), f"link {link} was not closed by {self.open_end(tap)}")
        require(not first or tap.first == first, f"link {link} was closed by {tap.first} first, wanted {first}")
        if silent:
            for end in "IR":
                require(not tap.sent(end, "record"), f"{end} sent a record after a handshake that was attacked")
        stage = self.verdict(link)
        if control:
            self.control()
        return Seen(seen, stage)

    @staticmethod
    def open_end(tap: Tap) -> str:
        return {"I": "the responder", "R": "the initiator", "": "either end"}[tap.first]

    def grade(self, answer: dict[str, Any], ids: Sequence[Sequence[int]], count: int) -> str:
        """What a client saw: an error, after at most a true prefix of what it asked for. Anything else: Survived."""
        delivered = answer["tokens"]
        for request, tokens in zip(ids, delivered, strict=False):
            wanted = self.expected(request, count)
            require(tokens == wanted[: len(tokens)], "the client was given other tokens than an untouched run gives")
        if answer["error"] is None:
            raise Survived("the client was given a whole answer and no error")
        kind, text, code = answer["error"]
        require(code in (1, 3, 4), f"the client fell over {kind}: {text}")
        number = sum(map(len, delivered))
        return f"{kind} (exit {code})" + (f" after {number} true tokens" if number else "")

    def calm(self) -> None:
        """Leaves nothing of the attack before: no rule, no connection, no other way."""
        for proxy, port in zip(self.stages.proxies, self.stages.ports, strict=True):
            proxy.upstream = port
            proxy.reset()

    # What the stages say.

    def mark(self) -> None:
        """Forgets what the stages have logged so far, and the channels that there are."""
        logs = [self.stages.log(index) for index in range(len(self.stages.ports))]
        self._marks = [len(log) for log in logs]
        self._channels = [
            max([0, *(int(number) for number, *_ in _VERDICT.findall(_current(log)) if number)]) for log in logs
        ]

    def said(self, index: int) -> str:
        """What a stage has logged since `mark`."""
        return self.stages.log(index)[self._marks[index] :]

    def verdict(self, index: int, timeout: float = PATIENCE) -> str:
        """How stage `index` logged the end of the first channel since `mark` that has ended."""
        found: list[str] = []

        def ended() -> bool:
            found[:] = [
                match[2] + match[3]
                for match in map(_VERDICT.search, self.said(index).split("\n")[:-1])  # lines that are whole
                if match and int(match[1] or 1 << 60) > self._channels[index] and match[2] != "open"
            ]
            return bool(found)

        if not eventually(ended, timeout):
            return "closed without a word"
        return found[0].split(":")[0].strip()[:40]

    def steps(self, index: int = 0, stages: Pipes | None = None) -> int:
        """How many steps a stage has computed, by its own report."""
        pipes = stages or self.stages
        for proxy in pipes.proxies:
            proxy.reset()
        with minigpt.Pipeline.connect(pipes.path, allow_mock=True, connect_timeout=PATIENCE) as asking:
            steps = asking.status()[index].steps
        assert steps is not None, "every client is an operator here"
        return steps

    def memory(self, index: int, stages: Pipes | None = None) -> int:
        """Bytes of a stage's process that are in memory."""
        return resident((stages or self.stages).processes[index].pid)

    def dial(self, stages: Pipes | None = None) -> StageLink:
        """A bare link to stage 0, for a client that does not behave."""
        made = stages or self.stages
        end = links.calling_end(made.manifest, 0, None)
        return StageLink(links.dial(made.manifest, made.addresses, 0, end, Deadlines()), made.manifest, 0, PATIENCE)


def _current(log: str) -> str:
    """What a stage has logged since it was last started: it counts its channels from there."""
    return log[max(log.rfind(": INFO ready: "), 0) :]


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    words = Path(f"/proc/{pid}/statm").read_text().split()
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE")


def together(seen: Sequence[Seen]) -> Seen:
    """What was seen in several cases, each thing once with its number."""

    def count(words: list[str]) -> str:
        return "; ".join(f"{words.count(word)} × {word}" for word in dict.fromkeys(words))

    return Seen(count([one.client for one in seen]), count([one.stage for one in seen]))


__all__ = ["FLAGS", "PLAIN_STAGE", "ROOT", "Arena", "Client", "Pipes", "eventually", "resident", "together"]
