"""`blues generate`, `evaluate` and `export` as a person types them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from blues.cli import main
from tests.evaluation.stores import make_store
from tests.inference.models import write_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("run")
    words = ["def main():\n    return 1\n"] * 20
    data = make_store(folder / "data", train=words, validation=words)
    write_run(folder / "run", data_path=str(data))
    return str(folder / "run")


def generate(*words: str) -> int:
    return main(["generate", *words])


def test_standard_output_holds_the_text_alone_and_the_rest_is_figures(run_dir, capsys):
    flags = ("--checkpoint", run_dir, "--prompt", "def ", "--temperature", "0")
    assert generate(*flags, "--max-length", "9") == 0
    out, err = capsys.readouterr()
    assert out.startswith("def ") and len(out) > len("def \n") and out.endswith("\n")
    words = err.strip()
    assert words.startswith("4 prompt tokens, 9 new tokens, ") and words.endswith("stopped: max_length reached")
    assert "tokens/s" in words
    assert generate(*flags) == 0
    assert "7 new tokens" in capsys.readouterr().err, "the run's own inference settings are the defaults"


def test_a_seed_fixes_the_text_and_a_prompt_may_come_from_a_pipe(run_dir, capsys, monkeypatch):
    outputs = []
    for words in (("--prompt", "x", "--seed", "3"), ("--prompt", "-", "--seed", "3"), ("--prompt", "x", "--seed", "4")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("x"))
        assert generate("--checkpoint", run_dir, "--top-p", "1", "--top-k", "0", *words) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_eval_text_measures_a_file_or_words(run_dir, capsys, tmp_path):
    assert generate("--checkpoint", run_dir, "--eval-text", "def main() and more words") == 0
    out = capsys.readouterr().out
    assert "perplexity" in out and "MaxVio" in out and "e3" in out
    file = tmp_path / "a.py"
    file.write_text("def main(): pass\n")
    assert generate("--checkpoint", run_dir, "--eval-text", str(file), "--prompt", "a", "--max-length", "1") == 0
    assert str(file) in capsys.readouterr().out


def test_evaluate_prints_a_table_or_json_of_the_runs_own_validation_split(run_dir, capsys, tmp_path):
    assert main(["evaluate", "--checkpoint", run_dir]) == 0
    table = capsys.readouterr().out
    assert "validation split of" in table and "Without context" in table
    assert main(["evaluate", "--checkpoint", run_dir, "--json", "--max-tokens", "30", "--split", "train"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["subject"].startswith("train split of") and tree["sources"]["data"]["tokens"] < 60
    other = make_store(tmp_path / "other", train=["a b c"], validation=["d e f"])
    assert main(["evaluate", "--checkpoint", run_dir, "--data-cache-dir", str(other), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["sources"]) == ["other"]
    assert main(["evaluate", "--checkpoint", run_dir, "--text", "some words to score", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 3


def test_evaluate_draws_the_experts(run_dir, capsys, tmp_path):
    figure = tmp_path / "figures/experts.png"
    assert main(["evaluate", "--checkpoint", run_dir, "--figure", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_export_says_how_to_load_and_generate_reads_it(run_dir, capsys, tmp_path):
    output = str(tmp_path / "exported")
    assert main(["export", "--checkpoint", run_dir, "--output", output]) == 0
    assert f"AutoModelForCausalLM.from_pretrained({output!r})" in capsys.readouterr().out
    flags = ("--prompt", "def ", "--temperature", "0", "--max-length", "7")
    assert generate("--checkpoint", run_dir, *flags) == generate("--checkpoint", output, *flags) == 0
    first, second = capsys.readouterr().out.split("def ")[1:]
    assert first == second
    assert main(["export", "--checkpoint", run_dir, "--output", output]) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["generate", "--checkpoint", "nowhere", "--prompt", "a"], "there is no checkpoint at nowhere"),
        (["generate", "--checkpoint", "RUN"], "give --prompt TEXT"),
        (["generate", "--checkpoint", "RUN", "--prompt", "a", "--top-p", "1.5"], "--top-p"),
        (["generate", "--checkpoint", "RUN", "--prompt", "a", "--top-p", "much"], "--top-p"),
        (["generate", "--checkpoint", "RUN", "--prompt", "q" * 99], "the prompt has 99 tokens"),
        (["generate", "--checkpoint", "RUN", "--eval-text", "missing.txt"], "there is no file 'missing.txt'"),
        (["generate", "--checkpoint", "RUN", "--prompt", "a", "--device", "abacus"], "device 'abacus'"),
        (["evaluate", "--checkpoint", "nowhere"], "there is no checkpoint at nowhere"),
        (["evaluate", "--checkpoint", "RUN", "--data-cache-dir", "nowhere"], "dataset 'nowhere' does not exist"),
        (["evaluate", "--checkpoint", "RUN", "--context", "4096"], "sees 48 tokens at once"),
        (["evaluate", "--checkpoint", "RUN", "--figure", "/dev/null/a.png"], "cannot draw to '/dev/null/a.png'"),
        (["export", "--checkpoint", "nowhere", "--output", "x"], "there is no checkpoint at nowhere"),
    ],
)
def test_mistakes_get_one_sentence_and_status_2(words, sentence, run_dir, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main([run_dir if word == "RUN" else word for word in words])
    except SystemExit as stop:  # argparse's own
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2 and sentence in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("start", [["-m", "jobs.generate"], ["jobs/generate.py"]], ids=str)
def test_a_job_runs_as_a_module_and_as_a_file(start, run_dir):
    words = ["--checkpoint", run_dir, "--prompt", "def ", "--max-length", "3"]
    done = subprocess.run([sys.executable, *start, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("def ") and "3 new tokens" in done.stderr
