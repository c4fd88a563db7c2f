"""`blues merge` as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from blues.cli import main
from blues.data.merging.merge import STRATEGIES, open_dataset
from blues.data.storage import store as st
from blues.data.storage.versions import drop_documents
from tests.data.datasets import make_numbered, make_store, snapshot

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("sources")
    made = (make_numbered(folder / name, windows=9, length=n, first=10 * n) for name, n in (("code", 8), ("text", 2)))
    return [str(path) for path in made]


def run(sources: list[str], output: Path, *words: str) -> int:
    return main(["merge", "--datasets", *sources, "--output", str(output), *words])


def test_it_writes_the_mixture_and_prints_its_sources(sources, tmp_path, capsys):
    assert run(sources, tmp_path / "mix", "--weights", "0.7", "0.3", "--strategy", "weighted") == 0
    out, err = capsys.readouterr()
    assert err == "" and f"dataset {tmp_path / 'mix'} (weighted)" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["code", "1", "0.700", "1", "73", "17"] in rows and ["text", "1", "0.300", "1", "19", "5"] in rows
    dataset = open_dataset(tmp_path / "mix")
    assert [float(weight) for weight in dataset.weights] == [0.7, 0.3]


@pytest.mark.parametrize(
    ("strategy", "words", "shares"),
    [
        ("weighted", ("--weights", "3", "1"), [0.75, 0.25]),
        ("equal", (), [0.5, 0.5]),
        ("proportional", (), [73 / 92, 19 / 92]),
    ],
)
def test_every_strategy(sources, tmp_path, strategy, words, shares):
    assert strategy in STRATEGIES
    assert run(sources, tmp_path / "mix", "--strategy", strategy, *words) == 0
    assert [float(weight) for weight in open_dataset(tmp_path / "mix").weights] == pytest.approx(shares)


def test_the_output_may_be_named_as_blues_01_did(sources, tmp_path):
    output = str(tmp_path / "mix")
    assert main(["merge", "--datasets", *sources, "--strategy", "equal", "--data-cache-dir", output]) == 0
    assert open_dataset(output).strategy == "equal"


def test_verify_reads_everything_and_its_issues_are_exit_status_2(tmp_path, capsys):
    sources = [str(make_store(tmp_path / name, train=[[f"text {name}"]], validation=[["held"]])) for name in "ab"]
    assert run(sources, tmp_path / "mix", "--strategy", "equal", "--verify") == 0
    assert "good: all checksums hold, 4 documents tokenize to what is stored" in capsys.readouterr().out
    file = tmp_path / "b" / "chunks" / "train-00001-00000.tokens"
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    assert run(sources, tmp_path / "mix", "--strategy", "equal", "--verify") == 2
    out = capsys.readouterr().out
    assert "b/chunks/train-00001-00000.tokens: its bytes do not match the checksum" in out


# From a file.


@pytest.fixture
def config(sources, tmp_path) -> Path:
    """A file beside the data, that weights them 3 to 1."""
    path = tmp_path / "mix.yaml"
    path.write_text(f"datasets:\n  paths: {json.dumps(sources)}\n  weights: [3, 1]\n  merge_strategy: weighted\n")
    return path


def test_a_file_says_what_is_merged(config, tmp_path, capsys):
    assert main(["merge", "--config", str(config), "--output", str(tmp_path / "mix")]) == 0
    assert capsys.readouterr().err == ""
    assert [float(weight) for weight in open_dataset(tmp_path / "mix").weights] == [0.75, 0.25]


@pytest.mark.parametrize(
    ("words", "shares", "said"),
    [
        (["--weights", "1", "4"], [0.2, 0.8], ["--weights instead of those of FILE"]),
        (["--merge-strategy", "equal"], [0.5, 0.5], ["--strategy equal instead of weighted of FILE"]),
        (["--strategy", "weighted"], [0.75, 0.25], []),
    ],
)
def test_options_replace_the_values_of_the_file_and_it_is_said(config, tmp_path, capsys, words, shares, said):
    assert main(["merge", "--config", str(config), "--output", str(tmp_path / "mix"), *words]) == 0
    err = capsys.readouterr().err
    assert err.splitlines() == [f"blues merge: {line.replace('FILE', str(config))}" for line in said]
    assert [float(weight) for weight in open_dataset(tmp_path / "mix").weights] == shares


def test_datasets_of_the_command_line_replace_those_of_the_file(sources, config, tmp_path, capsys):
    words = ["merge", "--config", str(config), "--datasets", *reversed(sources), "--output", str(tmp_path / "mix")]
    assert main(words) == 0
    assert open_dataset(tmp_path / "mix").names == ("text", "code")
    assert f"--datasets instead of the paths of {config}" in capsys.readouterr().err
    words[5:6] = []
    assert main([*words, "--overwrite"]) == 2
    assert "2 weights for 1 datasets" in capsys.readouterr().err


def test_a_file_that_cannot_be_used_and_no_datasets_at_all_are_one_sentence(tmp_path, capsys):
    (tmp_path / "mix.yaml").write_text("datasets: {path: [a]}")
    output = ["--output", str(tmp_path / "mix")]
    for words, sentence in (
        (["--config", str(tmp_path / "mix.yaml")], "unknown key 'datasets.path'. Did you mean 'paths'?"),
        (["--config", str(tmp_path / "absent.yaml")], "cannot read configuration"),
        ([], "name what is merged: --datasets DIR DIR ..., or a file that does with --config FILE"),
    ):
        assert main(["merge", *words, *output]) == 2
        err = capsys.readouterr().err
        assert sentence in err and err.count("\n") == 1
    assert not (tmp_path / "mix").exists()


# Written out.


def test_a_mixture_is_written_out_verified_and_shown(tmp_path, capsys):
    sources = [
        str(make_store(tmp_path / name, train=[[f"{name} {n}" for n in range(40)]], validation=[["held"]]))
        for name in ("code", "text")
    ]
    output, page = tmp_path / "out", tmp_path / "page.html"
    words = ["--weights", "0.7", "0.3", "--materialize", "--compression", "zstd", "--seed", "3"]
    assert run(sources, output, *words, "--page", str(page)) == 0
    out, err = capsys.readouterr()
    assert err == "" and f"dataset {output} (weighted, written out)" in out
    assert any(line.split()[:3] == ["code", "1", "0.7000"] for line in out.splitlines())
    assert "good: " in out and "<html" in page.read_text()
    assert not open_dataset(output).merged and st.Store.open(output).check() == []
    before = snapshot(output)
    assert run(sources, output, *words) == 0
    assert "it was there already; nothing was done" in capsys.readouterr().out
    assert run(sources, output, "--strategy", "equal", "--materialize") == 2
    assert "already holds another mixture; choose another directory or pass --overwrite" in capsys.readouterr().err
    assert snapshot(output) == before
    assert run(sources, output, "--strategy", "equal", "--materialize", "--overwrite") == 0
    assert st.Store.open(output).manifest["operation"]["strategy"] == "equal"


def test_a_version_is_compacted(tmp_path, capsys):
    path = make_store(tmp_path / "data", train=[[f"text {n}" for n in range(30)]], validation=[["held"]])
    pieces = drop_documents(st.Store.open(path), {"train": [3, 9, 10, 20]}, {"kind": "deduplicate"})
    drop_documents(pieces, {"train": [0]}, {"kind": "deduplicate"})
    assert run([f"{path}@2"], tmp_path / "compact", "--materialize", "--keep-order") == 0
    assert f"dataset {tmp_path / 'compact'}: version 2 of data as it stands" in capsys.readouterr().out
    store = st.Store.open(tmp_path / "compact")
    assert store.fingerprint == pieces.fingerprint and store.manifest["segments"] is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--seed", "0"], "--seed needs --materialize: a mixture alone copies nothing"),
        (["--keep-order"], "--keep-order needs --materialize"),
        (["--materialize", "--keep-order"], "--keep-order writes one dataset as it stands, and there are code, text"),
        (["--materialize", "--num-workers", "0"], "--num-workers must be at least 1, got 0"),
        (["--materialize", "--compression", "gzip"], "unknown compression 'gzip'. Choose from: none, zstd."),
        (["--page", "/"], "--page: '/' is a folder"),
        (["--materialize", "--tokens", "0"], "0 tokens (--tokens) cannot be written; ask for 1 or more"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence_and_nothing_is_written(sources, tmp_path, capsys, words, sentence):
    assert run(sources, tmp_path / "mix", "--strategy", "equal", *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# What cannot be merged.


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--weights", "0.7"], "1 weights for 2 datasets"),
        (["--weights", "0", "0"], "the weights sum to zero"),
        (["--weights", "-0.7", "0.3"], "weight -0.7 is not a share"),
        (["--weights", "nan", "0.3"], "weight nan is not a share"),
        (["--weights", "inf", "0.3"], "weight inf is not a share"),
        (["--weights", "1", "1", "--strategy", "equal"], "weights mean nothing to the strategy 'equal'"),
        (["--strategy", "equl"], "Did you mean 'equal'"),
        ([], "needs weights, one for each dataset"),
    ],
)
def test_weights_that_do_not_fit_are_one_sentence(sources, tmp_path, capsys, words, sentence):
    assert run(sources, tmp_path / "mix", *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("blues merge: ") and sentence in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--weights", "many", "0.3"], ["--weights"], ["--outptu", "x"]])
def test_words_that_cannot_be_read_are_wrong_usage(sources, tmp_path, capsys, words):
    with pytest.raises(SystemExit) as ended:
        run(sources, tmp_path / "mix", *words)
    assert ended.value.code == 2 and "blues merge" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_dataset_and_a_taken_output_are_one_sentence(sources, tmp_path, capsys):
    assert run([sources[0], str(tmp_path / "absent")], tmp_path / "mix", "--strategy", "equal") == 2
    assert f"dataset '{tmp_path}/absent' does not exist" in capsys.readouterr().err
    before = snapshot(Path(sources[0]))
    assert run(sources, Path(sources[0]), "--strategy", "equal", "--overwrite") == 2
    assert "already holds something else; choose another directory" in capsys.readouterr().err
    assert snapshot(Path(sources[0])) == before and list(tmp_path.iterdir()) == []


def test_another_mixture_is_replaced_only_with_overwrite(sources, tmp_path, capsys):
    assert run(sources, tmp_path / "mix", "--strategy", "equal") == 0
    assert run(sources, tmp_path / "mix", "--strategy", "equal") == 0
    assert run(sources, tmp_path / "mix", "--strategy", "proportional") == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert open_dataset(tmp_path / "mix").strategy == "equal"
    assert run(sources, tmp_path / "mix", "--strategy", "proportional", "--overwrite") == 0
    assert open_dataset(tmp_path / "mix").strategy == "proportional"


def test_it_runs_as_a_module_from_the_folder_of_the_data(sources, tmp_path):
    command = [sys.executable, str(ROOT / "jobs" / "merge.py"), "--datasets", "code", "text"]
    folder = Path(sources[0]).parent
    output = tmp_path / "mix"
    subprocess.run([*command, "--strategy", "equal", "--output", str(output)], cwd=folder, check=True)
    paths = [source["path"] for source in json.loads((output / "mixture.json").read_bytes())["sources"]]
    assert all(not path.startswith("/") for path in paths)
    assert open_dataset(output).names == ("code", "text")
