"""`blues benchmark data` as a person types it, on tiny data: records, table and chart; no figure is judged here."""

from __future__ import annotations

import json

import pytest

from blues.cli import main
from tuning.benchmarks import data
from tuning.benchmarks.data import loader
from tuning.benchmarks.record import Spread

TINY = ["--store-gb", "0.001", "--windows", "32", "--repeat", "1"]


@pytest.fixture
def words(tmp_path) -> list[str]:
    return ["benchmark", "data", *TINY, "--work", str(tmp_path / "work"), "--output", str(tmp_path / "r.json")]


def test_a_group_is_measured_recorded_and_drawn_and_its_data_removed(words, tmp_path, capsys):
    assert main([*words, "--only", "verify"]) == 0
    out, err = capsys.readouterr()
    assert "verify: 0.010 GB of tokens" in out and "= Store.check, 0.010 GB: " in out and "wrote" in out
    assert "Store.check, 1 of 1: GB/s a core" in err
    tree = json.loads((tmp_path / "r.json").read_text())
    assert [m["name"] for m in tree["measurements"]] == ["Store.check", "blues verify", "xxh3 alone", "sha256 alone"]
    assert all(len(m["runs"]) == 1 and m["problem"] is None for m in tree["measurements"])
    assert len(tree["groups"]["verify"]["load"]) == 3 and tree["options"]["seed"] == 0
    assert (tmp_path / "r.png").exists() and not (tmp_path / "work" / "data").exists()


@pytest.mark.slow
def test_all_loaders_deliver_or_say_what_is_missing(words, tmp_path, capsys):
    assert main([*words, "--only", "loader"]) == 0
    tree = json.loads((tmp_path / "r.json").read_text())
    for measurement in tree["measurements"]:
        assert measurement["runs"] or "-m pip install" in measurement["problem"], measurement["name"]
    assert [figure["name"] for figure in tree["figures"]][:3] == ["random windows", "open", "growth of memory"]


@pytest.mark.slow
@pytest.mark.ray
def test_preparing_counts_the_same_tokens_as_the_tokenizer_alone(words, tmp_path):
    corpus = tmp_path / "source"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number}.py").write_text(f"def f():\n    return {number}\n" * 50)
    main([*words, "--only", "prepare", "--corpus", str(corpus)])
    tree = json.loads((tmp_path / "r.json").read_text())
    [differing] = [figure for figure in tree["figures"] if figure["name"].startswith("blues prepare: tokens")]
    assert differing["met"]


@pytest.mark.slow
@pytest.mark.ray
def test_an_update_comes_to_what_preparing_anew_comes_to(words, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        for number in range(60):
            (folder / f"{number}.py").write_text(f"def {folder.name}():\n    return {number}\n" * 20)
    assert main([*words, "--only", "incremental", "--corpus", *map(str, folders)]) == 0
    tree = json.loads((tmp_path / "r.json").read_text())
    assert tree["groups"]["incremental"]["files"] == 120  # of both folders
    assert all(len(measurement["runs"]) == 1 for measurement in tree["measurements"])
    [differing] = [figure for figure in tree["figures"] if figure["name"].startswith("fingerprints")]
    assert differing["met"]


def test_a_group_that_fails_stops_no_other_and_ctrl_c_keeps_what_was_measured(words, tmp_path, capsys, monkeypatch):
    def measured(setting):
        setting.bench.begin("good", "works")
        setting.bench.figure("good", "speed", Spread((7.0,)), "MB/s")

    def interrupted(setting):
        raise KeyboardInterrupt

    def broken(setting):
        raise OSError(28, "No space left on device")

    groups = {"broken": broken, "good": measured, "stopped": interrupted, "never": pytest.fail}
    monkeypatch.setattr(data, "GROUPS", groups)
    assert main(words) == 130
    tree = json.loads((tmp_path / "r.json").read_text())
    assert tree["interrupted"] is True and [figure["name"] for figure in tree["figures"]] == ["speed"]
    out, _ = capsys.readouterr()
    assert "FAILED: [Errno 28] No space left on device" in out and "= speed: 7.00 MB/s" in out


def test_a_missing_peer_is_named_with_what_to_install(words, tmp_path, capsys, monkeypatch):
    def only_peers(setting):
        setting.bench.begin("loader", "peers")
        absent = loader._peer(setting, "no-such-peer", "write_mds", "read_mds")
        setting.bench.measure("loader", absent)

    monkeypatch.setattr(data.setting.Setting, "token_files", [])
    monkeypatch.setattr(data, "GROUPS", {"loader": only_peers})
    assert main(words) == 0  # skipped is not failed
    out, err = capsys.readouterr()
    for text in (out, err):
        assert "no-such-peer, shuffled: skipped: no-such-peer not installed" in text
        assert "-m pip install no-such-peer" in text


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--only", "loder"], "unknown group 'loder' in --only. Did you mean 'loader'?"),
        (["--peer-python", "nowhere/python"], "mend --peer-python"),
        (["--repeat", "0"], "--repeat must be at least 1, got 0"),
        (["--store-gb", "0"], "--store-gb and --corpus-mb must be more than 0"),
        (["--windows", "3"], "--windows must be at least 32"),
        (["--store-gb", "1e9", "--only", "loader"], "choose another --work or a smaller --store-gb"),
    ],
)
def test_what_a_person_gets_wrong_is_one_sentence(words, more, sentence, capsys):
    assert main([*words, *more]) in (1, 2)
    out, err = capsys.readouterr()
    assert sentence in err
