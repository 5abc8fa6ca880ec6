"""What `scripts/bench/peers.py` makes of its figures; the measuring itself takes long, and other engines."""

from pathlib import Path

import pytest

from scripts.bench import peers
from scripts.bench.peers import CASES, CONTESTANTS, Contestant, Failed, figure, interval, rows, takes_part


@pytest.mark.parametrize(
    ("count", "low", "high"),
    # ranks of the 95 % interval of a median, as tables of order statistics have them; 5 samples hold it with 93.75 %
    [(6, 1, 6), (8, 1, 8), (9, 2, 8), (10, 2, 9), (12, 3, 10), (20, 6, 15), (100, 40, 61)],
)
def test_interval_of_a_median(count: int, low: int, high: int) -> None:
    samples = [float(rank) for rank in range(1, count + 1)]
    assert interval(samples[::2] + samples[1::2]) == (low, high)


def test_no_interval_of_few_samples() -> None:
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None


def test_figure() -> None:
    assert figure([0.25]) == 250
    assert figure([0.25, 0.5, 1.25]) == 500


def test_rows_compare_within_rounds() -> None:
    torch = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    results = {
        "torch": {"a": torch},
        "stages 1": {"a": [5.0, 10.0, 15.0, 20.0, 25.0, 30.0]},
        "stages 2": {"a": [6.0, 12.0, 17.0, 22.0, 26.0, 31.0]},
        "stages 2 drafted": {"a": [3.0, 6.0, 8.5, 11.0, 13.0, 15.5], "b": [1.0] * 6},
    }
    assert list(rows(results)) == [
        ["a", "torch", "35.00", "–", "–", "–", "–"],
        ["a", "stages 1", "17.50", "0.500 (0.500–0.500)", "–", "–", "–"],
        # differences 1, 2, 2, 2, 1, 1: mean 1.5, deviation 0.5477, t of 5 degrees 2.571
        ["a", "stages 2", "19.50", "0.558 (0.517–0.600)", "time / stages 1's", "1.117 (1.033–1.200)", "+1.50 ± 0.57"],
        # differences from -3 to -15.5: mean -9.5, deviation 4.604
        ["a", "stages 2 drafted", "9.75", "0.279 (0.258–0.300)", "tokens/s / stages 2's", "2.000 (2.000–2.000)",
         "-9.50 ± 4.83"],
        ["b", "stages 2 drafted", "1.00", "–", "–", "–", "–"],
    ]  # fmt: skip


def test_rows_compare_a_batch_with_one_sequence_of_the_same_contestant() -> None:
    results = {
        "torch": {"1 x 32 + 20": [40.0] * 6, "8 x 32 + 20": [20.0] * 6},
        "stages 2": {"1 x 32 + 20": [30.0] * 6, "8 x 32 + 20": [10.0] * 6},
    }
    assert [row[1:] for row in rows(results)] == [
        ["torch", "40.00", "–", "–", "–", "–"],
        ["stages 2", "30.00", "0.750 (0.750–0.750)", "–", "–", "–"],
        ["torch", "20.00", "–", "tokens/s / its own of 1", "2.000 (2.000–2.000)", "-20.00 ± 0.00"],
        ["stages 2", "10.00", "0.500 (0.500–0.500)", "tokens/s / its own of 1", "3.000 (3.000–3.000)",
         "-20.00 ± 0.00"],
    ]  # fmt: skip


def test_every_contestant_has_a_case() -> None:
    for name in CONTESTANTS:
        assert any(takes_part(name, case) for case in CASES), name


def test_what_fails_says_so(tmp_path: Path) -> None:
    contestant = Contestant("stages none", tmp_path)
    with pytest.raises(Failed, match="invalid literal"):
        contestant.answer()
    contestant.close()


def test_machine_names_what_figures_depend_on() -> None:
    assert "cores" in peers.machine()
    assert "NumPy" in peers.machine()
