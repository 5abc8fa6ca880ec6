"""What `minigpt status` shows of the stages' reports."""

import datetime
from types import SimpleNamespace
from typing import Any, cast

from minigpt.cli import status
from minigpt.errors import StageError
from minigpt.protocol.manifest import Manifest
from minigpt.protocol.messages import StageReport
from minigpt.serve.metrics import Metrics


def state(stage: int, **figures: Any) -> dict[str, Any]:
    return {
        "stage": stage, "layers": [6 * stage, 6 * stage + 6], "address": f"tcp://127.0.0.1:{5001 + stage}",
        "provider": "mock", "evidence": "accepted", "error": None, "exposed": None, "uptime_s": 12.4,
        "weights_bytes": 5_413_440, "channels": 2, "sequences": 1, "cache_bytes": 368_640, "steps": 15, "tokens": 25,
        "rate": 2.55, "batch": 1.0, "queue": 0, "cache_limit": 0, "resumed": 0, **figures,
    }  # fmt: skip


def test_a_table_of_the_load_follows_the_places() -> None:
    told = status.shown([state(0), state(1, batch=7.96, rate=231.5, queue=3, cache_limit=536_870_912)])
    assert told == (
        "stage 0  layers 0-5  tcp://127.0.0.1:5001  mock evidence accepted\n"
        "stage 1  layers 6-11  tcp://127.0.0.1:5002  mock evidence accepted\n"
        "\n"
        "stage    up  weights  channels  sequences  queue  tokens/s  batch            cache  steps\n"
        "    0  12 s   5.4 MB         2          1      0       2.5    1.0           0.4 MB     15\n"
        "    1  12 s   5.4 MB         2          1      3     231.5    8.0  0.4 MB / 537 MB     15\n"
    )


def test_a_stage_that_failed_says_why_and_has_no_load() -> None:
    dead = state(1, error="stage 1 cannot be reached", evidence="unknown")
    lines = status.shown([state(0, exposed="core dumps are on"), dead]).splitlines()
    assert lines[0].endswith("accepted  not locked down: core dumps are on")
    assert status.shown([state(0, resumed=3)]).splitlines()[0].endswith("accepted  requests resumed: 3")
    assert lines[1].endswith("mock evidence unknown  stage 1 cannot be reached")
    assert [line.split()[:1] for line in lines[2:]] == [[], ["stage"], ["0"]]
    assert status.shown([dead]).count("\n") == 1


def test_what_is_not_told_is_a_dash_and_not_0() -> None:
    untold = dict.fromkeys(
        ("channels", "sequences", "cache_bytes", "steps", "tokens", "rate", "batch", "queue", "cache_limit", "resumed")
    )
    assert status.shown([state(0, uptime_s=120.0, **untold)]).splitlines()[2:] == [
        "stage     up  weights  channels  sequences  queue  tokens/s  batch  cache  steps",
        "    0  120 s   5.4 MB         -          -      -         -      -      -      -",
    ]


def test_whole_minutes_do_not_pass_for_seconds_where_there_is_none_yet() -> None:
    untold = dict.fromkeys(("channels", "sequences", "cache_bytes", "steps", "rate", "batch", "queue"))
    assert "< 1 min" in status.shown([state(0, uptime_s=0.0, **untold)])
    assert " 0 s " in status.shown([state(0, uptime_s=0.0)])


def test_no_keyword_of_python_is_in_a_report_that_could_not_be_had() -> None:
    def connect() -> Any:
        raise StageError("the handshake was late: allow it more with --handshake-timeout (handshake_timeout=)")

    entries = cast(Any, [SimpleNamespace(index=0), SimpleNamespace(index=1)])
    with status.Looker(connect, entries, lambda _: "give the places file with --places (places=)") as looker:
        first, second = looker.look()
    assert first.error.endswith("allow it more with --handshake-timeout")
    assert second.error.endswith("; give the places file with --places")


def test_the_table_of_a_large_and_old_pipeline_fits_100_columns() -> None:
    large = {
        "uptime_s": 3e9, "weights_bytes": 800 * 10**9, "channels": 99_999_999, "sequences": 999_999_999,
        "queue": 99_999, "rate": 999_999.9, "batch": 999.9, "cache_bytes": 800 * 10**9, "cache_limit": 900 * 10**9,
        "steps": 9_999_999_999,
    }  # fmt: skip
    lines = status.shown([state(255, **large)]).splitlines()
    assert max(map(len, lines[2:])) <= 100


def test_the_metrics_have_no_series_of_what_is_not_told() -> None:
    manifest = SimpleNamespace(
        expires=datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC), endorsed_days=lambda index, text: None
    )
    metrics = Metrics(cast(Manifest, manifest), lambda: (0, 0))
    told = metrics.show([StageReport(0, uptime=60.0, weights_bytes=9), StageReport(1, tokens=7)], []).decode()
    assert 'minigpt_stage_up{stage="0"} 1.0' in told
    assert 'minigpt_stage_uptime{stage="0"} 60.0' in told
    assert 'minigpt_stage_tokens_total{stage="0"}' not in told
    assert 'minigpt_stage_tokens_total{stage="1"} 7.0' in told
