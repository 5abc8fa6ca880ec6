"""Where a token's time goes: the breakdown of `minigpt bench`, from spans made by hand and from a real pipeline."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made import SMALL, random_tensors, write
from processes import ROOT

from minigpt.cli import bench, clients
from minigpt.cli.bench import Part, Run
from minigpt.cli.clients import Crowd
from minigpt.client.pipeline import Pipeline
from minigpt.client.text import Generation
from minigpt.protocol.messages import Answer, Generate, Reason, Span, Tokens


def spans(*parties: Part) -> tuple[Span, ...]:
    """What the parties would say of themselves: each waits for its wire, and for all that the parties after it do."""
    return tuple(
        Span(party.compute, party.seal, party.open, party.wire + sum(map(sum, parties[place + 1 :])), 7.0)
        for place, party in enumerate(parties)
    )


# Powers of two: each sum of them tells which were added, and is exact.
CLIENT, FIRST, LAST = Part(0.0, 1.0, 2.0, 4.0), Part(8.0, 16.0, 32.0, 64.0), Part(128.0, 0.0, 0.0, 0.0)
MIDDLE = Part(256.0, 512.0, 1024.0, 2048.0)


@pytest.mark.parametrize("parties", [(CLIENT, LAST), (CLIENT, FIRST, LAST), (CLIENT, FIRST, MIDDLE, LAST)])
def test_the_parts_of_a_token_add_up_to_the_time_of_the_client(parties: tuple[Part, ...]) -> None:
    told = spans(*parties)
    assert tuple(bench.parts(told)) == parties
    assert sum(map(sum, bench.parts(told))) == told[0].seal + told[0].open + told[0].wait


def test_a_wire_is_the_wait_less_all_that_the_next_stage_says_of_itself() -> None:
    client = Span(0.0, 0.25, 0.5, 31.0, 9.0)
    first, last = Span(8.0, 1.0, 0.5, 16.0, 9.0), Span(10.0, 0.0, 0.0, 0.0, 0.0)
    found = bench.parts((client, first, last))
    assert [part.wire for part in found] == [31 - (8 + 1 + 0.5 + 16), 16 - 10, 0]
    assert bench.parts((client._replace(wait=25.0), first, last))[0].wire == -0.5  # it came sooner than the one before


def run(*tokens: tuple[Span, ...]) -> Run:
    return Run(first=1.0, between=(1.0,) * (len(tokens) - 1), spans=tokens, bytes_per_token=0.0)


def test_the_breakdown_has_the_median_of_each_part_over_the_tokens_after_the_first_of_all_runs() -> None:
    def token(compute: float, wire: float) -> tuple[Span, ...]:
        return spans(Part(0.0, 0.0, 0.5, 2 * wire), Part(compute, 0.125, 0.25, wire), Part(3 * compute, 0.0, 0.0, 0.0))

    prompt = token(1000.0, 1000.0)
    runs = [run(prompt, token(1.0, 32.0), token(2.0, 8.0)), run(prompt, token(4.0, 16.0))]
    assert bench.breakdown({2: runs}) == [  # 2 of 1, 2, 4; and 16, of another token, of 8, 16, 32
        {"stages": 2, "party": "client", "compute_ms": 0, "seal_ms": 0, "open_ms": 500, "wire_ms": 32000},
        {"stages": 2, "party": "stage 0", "compute_ms": 2000, "seal_ms": 125, "open_ms": 250, "wire_ms": 16000},
        {"stages": 2, "party": "stage 1", "compute_ms": 6000, "seal_ms": None, "open_ms": None, "wire_ms": None},
    ]


def test_tokens_that_came_together_share_the_parts_of_their_step() -> None:
    step = spans(Part(0.0, 0.0, 3.0, 6.0), Part(12.0, 0.0, 0.0, 0.0))

    def answers() -> Generator[Answer, None, Reason]:
        yield Tokens(2, (5,), (), spans(Part(0.0, 99.0, 99.0, 99.0), Part(99.0, 0.0, 0.0, 0.0)))
        yield Tokens(3, (6, 7, 8), (), step)
        return Reason.LENGTH

    def generate(ids: list[int], max_tokens: int, draft: int, spans: bool) -> Generation:
        return Generation(answers(), Generate(0, tuple(ids), max_tokens, draft=draft), SMALL)

    pipeline: Any = SimpleNamespace(tokenizer=None, generate=generate)
    found = bench.run_once(pipeline, "1 2", 4)
    assert [bench.parts(each) for each in found.spans[1:]] == [
        [Part(0.0, 0.0, 1.0, 2.0), Part(4.0, 0.0, 0.0, 0.0)],
    ] * 3
    client, stage = bench.breakdown({1: [found]})
    assert (client["open_ms"], client["wire_ms"], stage["compute_ms"]) == (1000, 2000, 4000)


def test_the_breakdown_is_a_table_after_that_of_the_latencies() -> None:
    token = spans(Part(0.0, 0.0, 0.00025, 0.0005), Part(0.002, 0.0, 0.0, 0.0))
    latencies, sentence, breakdown = bench.tables({1: [run(token, token)]}).split("\n\n")
    assert latencies.startswith("| stages | TTFT ms |")
    assert sentence == bench.BREAKDOWN
    assert breakdown.splitlines() == [
        "| stages | party | compute | seal | open | wire |",
        "|---:|---:|---:|---:|---:|---:|",
        "| 1 | client | 0.000 | 0.000 | 0.250 | 0.500 |",
        "| 1 | stage 0 | 2.000 | – | – | – |",
    ]


def test_of_single_tokens_there_is_no_breakdown() -> None:
    results = {1: [run(spans(CLIENT, LAST))]}
    assert bench.figures(results)["breakdown"] == []
    assert bench.tables(results) == bench.markdown(bench.summarise(results))


def test_a_plot_says_each_mean_with_its_interval_and_the_same_figures_give_the_same_file() -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    from minigpt.cli import plot

    slow = Run(0.25, (0.5, 0.5), (), 0.0)
    rows = bench.summarise({1: [slow, slow], 2: [slow._replace(first=0.375), slow._replace(between=(1.0, 1.0))]})
    picture = plot.draw(rows, "tiny", "svg").decode()
    for words in (
        "tiny",
        "1 stage",
        "2 stages",
        "500.00 ± 0.00",
        "250.00 ± 0.00",
        "750.00 ± 3176.50",
        "312.50 ± 794.12",
    ):
        assert words in picture
    assert plot.draw(rows, "tiny", "svg").decode() == picture
    single = plot.draw(bench.summarise({1: [Run(0.25, (), (), 0.0)]}), "tiny", "svg").decode()
    assert (">250.00<" in single, "±" in single) == (True, False)
    assert [name in single for name in plot.PANELS.values()] == [False, True]


@pytest.mark.parametrize(("name", "begins"), [("a.svg", b"<?xml"), ("b.PNG", b"\x89PNG")])
def test_bench_draws_into_a_file(tmp_path: Path, name: str, begins: bytes) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    command = [sys.executable, "-m", "minigpt", "bench", "--model", str(folder), "--prompt", "1 2", "--max-tokens", "2"]
    done = subprocess.run([*command, "--runs", "1", "--plot", str(tmp_path / name)], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"| stages |")
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_without_matplotlib_a_plot_is_refused_before_anything_is_measured() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from minigpt.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "bench", "--model", "/nowhere", "--plot", "latencies.svg"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("minigpt: --plot needs matplotlib")


def crowd(seconds: float, clients: int, gaps: int, gap: float = 0.5) -> Crowd:
    return Crowd(seconds, (0.25,) * clients, ((gap,) * gaps,) * clients)


def test_many_clients_are_compared_with_the_first_number_of_the_same_run() -> None:
    results = {
        (1, 1): [crowd(2.0, 1, 3), crowd(4.0, 1, 3)],  # 2 and 1 tokens a second
        (1, 8): [crowd(4.0, 8, 3), crowd(4.0, 8, 3, 1.5)],  # 8 and 8
        (2, 1): [crowd(4.0, 1, 3), crowd(4.0, 1, 3)],
        (2, 8): [crowd(2.0, 8, 9), crowd(2.0, 8, 9)],  # 40 and 40
    }
    rows = clients.summarise(results)
    assert [row["tokens_per_second"]["mean"] for row in rows] == [1.5, 8, 1, 40]
    assert [row["ratio"] and row["ratio"]["mean"] for row in rows] == [None, 6, None, 40]
    assert (rows[1]["ttft_p50_ms"], rows[1]["ttft_p99_ms"]) == (250, None)
    assert (rows[1]["gap_p50_ms"], rows[1]["gap_p99_ms"]) == (1000, None)  # of 48 samples there is no p99
    assert rows[3]["gap_p99_ms"] == 500
    head, _, *lines = clients.markdown(results).splitlines()
    assert head == "| stages | clients | tokens/s | ratio | TTFT p50 ms | p99 | gap p50 ms | p99 |"
    assert lines[3] == "| 2 | 8 | 40.0 ± 0.0 | 40.00 ± 0.00 | 250.0 | – | 500.00 | 500.00 |"


def test_bench_measures_many_clients_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    command = [sys.executable, "-m", "minigpt", "bench", "--model", str(folder), "--prompt", "1 2", "--max-tokens", "3"]
    command += ["--stages", "1,2", "--runs", "2", "--clients", "1,5"]
    done = subprocess.run([*command, "--format", "json"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    shapes = [(row["stages"], row["clients"]) for row in told["summary"]]
    assert shapes == [(1, 1), (1, 5), (2, 1), (2, 5)]
    assert [(run["stages"], run["clients"], run["run"]) for run in told["runs"]] == [
        (*shape, run) for shape in shapes for run in (0, 1)
    ]
    for run in told["runs"]:
        assert len(run["ttft_ms"]) == len(run["between_ms"]) == run["clients"]
        assert max(run["ttft_ms"]) / 1000 <= run["seconds"]
    done = subprocess.run([*command, "--plot", "a.svg"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "leave out --clients" in done.stderr


def test_a_client_that_fails_ends_the_measurement_with_the_reason(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    command = [sys.executable, "-m", "minigpt", "bench", "--model", str(folder), "--prompt", "1 2", "--clients", "9"]
    full = os.environ | {"MINIGPT_MAX_CHANNELS": "2"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=full)
    assert done.returncode == 4
    assert done.stderr.startswith("minigpt: stage 0 ")
    assert "Traceback" not in done.stderr


def test_the_parts_of_a_real_token_are_the_time_since_the_one_before(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with Pipeline.local(str(folder), 3) as pipeline:
        made = bench.run_once(pipeline, "1 2 3", 60)
    assert len(made.between) > 8
    added = [sum(map(sum, bench.parts(token))) for token in made.spans[1:]]
    off = [abs(total / gap - 1) for total, gap in zip(added, made.between, strict=True)]
    assert statistics.median(off) < 0.1  # the median, for a busy machine may come between any two looks at the clock
    rows = bench.breakdown({3: [made]})
    assert [row["party"] for row in rows] == ["client", "stage 0", "stage 1", "stage 2"]
    for row in rows[1:-1]:
        assert all(isinstance(value, float) and value > 0 for name, value in row.items() if name.endswith("_ms")), row
    assert rows[0]["seal_ms"] == 0  # the client asks once
