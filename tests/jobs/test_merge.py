"""`blues merge` as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from blues.cli import main
from blues.data.merge import STRATEGIES, open_dataset
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
