"""What the groups ask for: sizes beside all names, nothing of an earlier run, and figures that are of the whole corpus.
No process is started: a bench that answers by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.datasets import make_store
from tuning.benchmarks.bench import Bench, Call
from tuning.benchmarks.data import incremental, prepare
from tuning.benchmarks.data.setting import Options, Setting
from tuning.benchmarks.record import Record

SECONDS = {"anew": 40.0, "new": 1.0, "same": 0.5}
"""By the end of the output's name; everything else takes a second and a second for each hundred bytes."""
FILE = "a = {:04}\n"


class Answering(Bench):
    """Answers what a run would, and leaves behind what it would: `asked` are the calls, `there` what they found."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.asked: list[Call] = []
        self.there: list[bool] = []

    def call(self, call: Call) -> dict:
        self.asked.append(call)
        output = call.arguments.get("output") or call.arguments.get("dataset")
        if output is not None:
            self.there.append(Path(output).exists())
        if call.function in ("follow", "command") and not Path(output).exists():
            make_store(Path(output), train=[[[1, 2]]], validation=[[[3]]])
        if call.function == "prepare":
            assert not Path(output).parent.exists()
            Path(output).mkdir(parents=True)  # as a run that is killed leaves it
        size = call.arguments.get("size", 400)
        seconds = SECONDS.get(str(output).rpartition("-")[2], 1.0 + size / 100)
        return {"s": seconds, "cpu s": seconds, "MB/s": size / seconds, "MB/s a core": 1.0, "tokens": 7}


@pytest.fixture
def setting(tmp_path, monkeypatch) -> Setting:
    monkeypatch.setattr("os.sync", lambda: None)  # waits for what others write, too
    source = tmp_path / "source"
    source.mkdir()
    for number in range(40):
        (source / f"{number:02}.py").write_text(FILE.format(number) * 10_000)
    bench = Answering(tmp_path / "work", Record(tmp_path / "r.json", {}), repeat=2, say=lambda line: None)
    return Setting(bench, Options(corpus=(str(source),)))


def figures(setting: Setting) -> dict[str, tuple[str, float]]:
    return {figure.name: (figure.of, figure.spread.mean) for figure in setting.bench.record.figures}


def test_preparing_starts_from_nothing_in_every_round_and_figures_are_of_the_whole_corpus(setting):
    prepare.measure(setting)
    record = setting.bench.record
    whole, quarter = setting.corpus.size, "0.900 MB"
    assert whole == "3.60 MB" and setting.corpus.bytes == 3_600_000
    for measurement in record.measurements:
        assert measurement.of == (quarter if "quarter" in measurement.name else whole)
    ours = [call for call in setting.bench.asked if call.function == "prepare"]
    assert len(ours) == 8 and {call.arguments["size"] for call in ours} == {3_600_000, 900_000}
    facts = record.groups["prepare"]
    assert (facts["corpus"]["bytes"], facts["quarter"]["bytes"]) == (3_600_000, 900_000)
    of = {name: of for name, (of, _) in figures(setting).items()}
    assert of["fast backend, everything included"] == of["share of the faster way of tiktoken alone"] == whole
    assert of["tiktoken: the start"] == f"{whole} less {quarter}"
    assert figures(setting)["tiktoken: the start"][1] == pytest.approx(1.0)  # as the answers have it
    assert figures(setting)["tiktoken: rate beyond the start"][1] == pytest.approx(100 / 1e6)


def test_updating_is_measured_with_changes_and_without_beside_preparing_anew(setting):
    incremental.measure(setting)
    assert not setting.bench.record.failed
    assert {of for of, _ in figures(setting).values()} == {setting.corpus.size}
    for how in ("inside", "command"):
        share = f"share of preparing anew, {how}, in time"
        assert figures(setting)[share][1] == pytest.approx(2.5)
        assert figures(setting)[f"nothing changed: {share}"][1] == pytest.approx(1.25)
    first, *rounds = setting.bench.asked
    assert first.arguments["mode"] == "prepare" and len(rounds) == 2 * 6
    commits = {
        call.arguments["commit"]: call.arguments["makes"] for call in rounds if call.arguments.get("mode") == "update"
    }
    assert commits[first.arguments["commit"]] is False and sorted(commits.values()) == [False, True]
    versions = [call.arguments["version"] for call in rounds if call.function == "command"]
    assert versions == [2, 1, 1] * 2
    assert setting.bench.there == [False] + 2 * [True, True, False, True, True, False]  # anew is anew, each time


def test_what_updates_begin_from_is_made_once_for_the_same_history(setting, tmp_path):
    incremental.measure(setting)
    lines: list[str] = []
    again = Setting(Answering(tmp_path / "work", Record(tmp_path / "s.json", {}), 1, lines.append), setting.options)
    incremental.measure(again)
    assert len(again.bench.asked) == 6 and sum("kept from" in line for line in lines) == 3
    other = Setting(Answering(tmp_path / "work", Record(tmp_path / "t.json", {}), 1, lines.append),
                    Options(corpus=again.options.corpus, edited=0.1))  # fmt: skip
    incremental.measure(other)  # commit A is the same, so is what was made of it
    assert len(other.bench.asked) == 6 and "  repository: made anew, what was kept has another share" in lines
