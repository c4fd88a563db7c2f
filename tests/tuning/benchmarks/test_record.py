"""Records: spreads, goals, a table that hides nothing, and a file that is whole after every measurement."""

from __future__ import annotations

import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.benchmarks.record import Figure, Measurement, Record, Spread, number, ratio

VALUES = st.lists(st.floats(0.01, 1e6), min_size=1, max_size=6)


def record(tmp_path) -> Record:
    made = Record(tmp_path / "r.json", {"seed": 3}, groups={"loader": {"title": "windows"}})
    runs = [{"MB/s": 800.0, "open ms": 2.0, "load": (0.1, 0.1, 0.1)} for _ in range(2)]
    made.measurements += [
        Measurement("loader", "ours", "blues", "", ("MB/s", "open ms"), of="10.0 GB", runs=runs),
        Measurement("loader", "theirs", "peer", "", ("MB/s", "s"), runs=[{"MB/s": 90.0, "load": (0.1, 0.1, 0.1)}]),
        Measurement("loader", "absent", "peer", "", ("MB/s",), problem="x not installed; pip install x", skipped=True),
        Measurement("loader", "broken", "peer", "", ("MB/s",), problem="it fell over"),
    ]
    made.figures.append(Figure("loader", "windows", Spread((800.0, 800.0)), "MB/s", at_least=500.0))
    made.figures.append(Figure("loader", "open", Spread((2.0,)), "ms", at_most=1.0))
    return made


@given(VALUES)
def test_a_spread_is_the_mean_and_the_sample_deviation(values):
    spread = Spread(tuple(values))
    assert spread.mean == pytest.approx(statistics.fmean(values))
    assert spread.deviation == (statistics.stdev(values) if len(values) > 1 else 0)
    assert ("±" in str(spread)) == (len(values) > 1)


@given(VALUES)
def test_the_ratio_of_runs_of_the_same_round_keeps_their_spread(values):
    same = ratio(Spread(tuple(values)), Spread(tuple(values)), 100)
    assert same.values == pytest.approx([100.0] * len(values))
    assert ratio(Spread((2.0, 4.0, 6.0)), Spread((2.0, 2.0))).values == (2.0,)  # a run is missing: of the means


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1,234"), (0.1234, "0.123"), (12.34, "12.3"), (1.234, "1.23")])
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("values", "goal", "met", "verdict"),
    [
        ((5.0, 6.0), {"at_least": 5.0}, True, "met"),
        ((4.0, 6.0), {"at_least": 5.0}, True, "met, but not in every repeat (1 of 2)"),
        ((2.0, 3.0, 7.0), {"at_most": 4.0}, True, "met, but not in every repeat (2 of 3)"),
        ((4.0, 6.0), {"at_most": 4.9}, False, "NOT met"),  # though one repeat reaches it
        ((4.0,), {"at_least": 4.0}, True, "met"),
        ((4.0,), {}, None, ""),
    ],
)
def test_goals_are_met_by_the_mean_and_repeats_that_miss_them_are_told(values, goal, met, verdict):
    figure = Figure("g", "n", Spread(values), "s", **goal)
    assert figure.met is met and figure.verdict == verdict
    assert (verdict in str(figure)) and figure.tree()["verdict"] == verdict


def test_a_figure_says_of_how_much_data_it_is_and_how_far_its_repeats_lie_apart():
    shown = str(Figure("g", "speed", Spread((61.0, 63.0)), "MB/s", "1,145 MB", at_least=62.0))
    assert shown == (
        "speed, 1,145 MB: 62.0 ± 1.41 MB/s (61.0 to 63.0), goal >= 62.0: met, but not in every repeat (1 of 2)"
    )
    assert str(Figure("g", "wrong", Spread((0.0, 0.0)), "", at_most=0.0)) == "wrong: 0.000 ± 0.000, goal <= 0.000: met"


def test_processor_time_that_could_not_be_counted_is_told_once(tmp_path):
    made = record(tmp_path)
    assert "processor time" not in made.table()
    for run in made.measurements[0].runs:
        run["processor_time"] = "getrusage: perf_event_open says 'Permission denied'"
    [line] = [line for line in made.table().splitlines() if "processor time" in line]
    assert "Permission denied" in line and "without that of Ray's processes" in line and "sysctl" in line


def test_the_table_shows_what_was_measured_skipped_and_lost(tmp_path):
    lines = record(tmp_path).table().splitlines()
    assert lines[0] == "loader: windows"
    assert [line.split() for line in lines[2:4]] == [
        ["blues", "ours,", "10.0", "GB", "800", "±", "0.000", "2.00", "±", "0.000"],
        ["peer", "theirs", "90.0"],
    ]
    assert "  peer       absent: skipped: x not installed; pip install x" in lines
    assert "  peer       broken: FAILED: it fell over" in lines
    assert "  = windows: 800 ± 0.000 MB/s, goal >= 500: met" in lines
    assert "  = open: 2.00 ms, goal <= 1.00: NOT met" in lines


def test_a_busy_machine_is_told(tmp_path):
    made = record(tmp_path)
    for measurement in made.measurements:
        for run in measurement.runs:
            run["load"] = (0.0, 0.0, 0.0)
    assert "busy" not in made.table()
    made.measurements[0].runs[0]["load"] = (5000.0, 0.0, 0.0)
    assert "  the machine was busy with other work, load 0.0 to 5000.0 on " in made.table()


def test_the_file_holds_everything_that_decides_a_figure(tmp_path):
    made = record(tmp_path)
    made.save()
    tree = json.loads((tmp_path / "r.json").read_text())
    assert tree["options"] == {"seed": 3} and tree["interrupted"] is False
    assert {"cpu", "cores", "ram_gb"} <= set(tree["device"]) and tree["versions"]["numpy"] and "commit" in tree
    ours, theirs, absent, _ = tree["measurements"]
    spread = {"mean": 800.0, "deviation": 0.0, "min": 800.0, "max": 800.0, "values": [800.0, 800.0]}
    assert ours["summary"]["MB/s"] == spread and ours["of"] == "10.0 GB"
    assert theirs["summary"].keys() == {"MB/s"} and absent["skipped"] is True
    assert [(figure["met"], figure["met_in"]) for figure in tree["figures"]] == [(True, 2), (False, 0)]
    assert [measurement.name for measurement in made.failed] == ["broken"]
