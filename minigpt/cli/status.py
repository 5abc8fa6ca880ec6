"""What `minigpt status` asks for and shows: the stages' places and evidence, then a table of their load."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from minigpt.cli.terminal import say
from minigpt.cli.values import without_keywords
from minigpt.client.pipeline import Pipeline
from minigpt.errors import RequestRefused, StageError, UntrustedStage
from minigpt.protocol.manifest import Manifest, StageEntry
from minigpt.protocol.messages import StageReport

MOCK_NOTICE = "mock evidence: the signatures are valid, but they prove nothing about hardware"
CLEAR = "\033[H\033[J"  # the terminal, from its upper left corner on
_FIGURES = {"uptime_s": "uptime"} | {
    name: name
    for name in ("weights_bytes", "channels", "sequences", "cache_bytes", "steps", "tokens", "rate", "batch", "queue",
                 "cache_limit", "resumed")
}  # fmt: skip
_TITLES = ("stage", "up", "weights", "channels", "sequences", "queue", "tokens/s", "batch", "cache", "steps")


class Looker:
    """Asks for the stages' state, each time over the same link; one that broke is dialled again for the next look."""

    def __init__(
        self, connect: Callable[[], Pipeline], entries: Sequence[StageEntry], listens: Callable[[int], str]
    ) -> None:
        """`listens` says of a stage, which nobody could be asked about, whether anything is there."""
        self._connect = connect
        self._entries = entries
        self._listens = listens
        self._pipeline: Pipeline | None = None

    def look(self) -> tuple[StageReport, ...]:
        """A report of every stage; one that cannot be asked has an `error`."""
        try:
            if self._pipeline is None:
                self._pipeline = self._connect()
            reports = self._pipeline.status()
        except (StageError, RequestRefused) as error:
            reason = "attestation" if isinstance(error, UntrustedStage) else "failed"
            reports = (StageReport(0, error=without_keywords(str(error)), reason=reason),)
        rest = [entry.index for entry in self._entries[len(reports) :]]
        if not rest:
            return reports
        why = f"not asked, because stage {rest[0] - 1} before it failed"
        with ThreadPoolExecutor(len(rest)) as pool:  # each may take seconds
            found = [without_keywords(words) for words in pool.map(self._listens, rest)]
        return (*reports, *(StageReport(i, f"{why}; {words}", "failed") for i, words in zip(rest, found, strict=True)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._pipeline is not None:
            self._pipeline.close()


def exit_code(reports: Sequence[StageReport]) -> int:
    """What one look ends with."""
    if any(report.reason == "attestation" for report in reports):
        return UntrustedStage.exit_code
    return StageError.exit_code if any(report.error for report in reports) else 0


def state(manifest: Manifest, report: StageReport, address: str | None) -> dict[str, Any]:
    """A stage for --json: what the manifest says about it, where it is as far as is known, and what was found."""
    entry = manifest.stages[report.stage]
    return {
        "stage": entry.index,
        "layers": [entry.layers.start, entry.layers.stop],
        "address": address,
        "provider": entry.platform.name,
        "test_root": None if entry.test_root is None else entry.test_root.hex(),
        "evidence": "refused" if report.reason == "attestation" else "unknown" if report.error else "accepted",
        "endorsements_expire_days": manifest.endorsed_days(entry.index, report.evidence),
        "error": report.error or None,
        "exposed": report.exposed or None,
        **{name: None if report.error else getattr(report, field) for name, field in _FIGURES.items()},
    }


def place(state: dict[str, Any]) -> str:
    """A stage in a line: where it is, and whether its evidence was accepted."""
    first, end = state["layers"]
    where = f"stage {state['stage']}  layers {first}-{end - 1}  {state['address'] or '-'}"
    root = " under a test's root" if state.get("test_root") else ""
    return f"{where}  {state['provider']} evidence {state['evidence']}{root}"


def say_if_mock(stages: Sequence[dict[str, Any]]) -> None:
    if any(stage["provider"] == "mock" and stage["evidence"] == "accepted" for stage in stages):
        say(MOCK_NOTICE)


def shown(states: Sequence[dict[str, Any]]) -> str:
    """All stages for people: a line for each, then a table of those that answered, of at most 100 columns."""
    lines = [place(one) + "".join(f"  {words}" for words in _words(one)) for one in states]
    rows = [_TITLES, *(_row(one) for one in states if one["error"] is None)]
    if len(rows) > 1:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["", *("  ".join(map(str.rjust, row, widths)) for row in rows)]
    return "\n".join(lines) + "\n"


def _words(state: dict[str, Any]) -> list[str]:
    if state["error"]:
        return [state["error"]]
    days = state.get("endorsements_expire_days")
    words = [] if days is None else [f"endorsements end in {days:.1f} days"]
    words += [f"not locked down: {state['exposed']}"] if state["exposed"] else []
    return words + ([f"requests resumed: {state['resumed']}"] if state["resumed"] else [])


def _row(state: dict[str, Any]) -> tuple[str, ...]:
    uptime, limit = state["uptime_s"], state["cache_limit"]
    return (
        str(state["stage"]),
        "< 1 min"
        if state["steps"] is None and uptime < 60  # told in whole minutes
        else f"{uptime:.0f} s"
        if uptime < 10_000
        else f"{uptime / 3600:.0f} h",
        _size(state["weights_bytes"]),
        *(_told(state[name]) for name in ("channels", "sequences", "queue")),
        _told(state["rate"], "{:.1f}"),
        _told(state["batch"], "{:.1f}"),
        "-" if state["cache_bytes"] is None else _size(state["cache_bytes"]) + (f" / {_size(limit)}" if limit else ""),
        _told(state["steps"]),
    )


def _told(figure: float | None, form: str = "{}") -> str:
    """A figure, if it was told to this client."""
    return "-" if figure is None else form.format(figure)


def _size(count: int) -> str:
    """Bytes, in at most seven characters.

    >>> _size(1_900_000), _size(155_250_000), _size(20_500_000_000)
    ('1.9 MB', '155 MB', '20.5 GB')
    """
    number, unit = (count / 1e6, "MB") if count < 999.5e6 else (count / 1e9, "GB")
    return f"{number:.1f} {unit}" if number < 99.95 else f"{number:.0f} {unit}"
