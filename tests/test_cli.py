"""The command line: names, help, exit statuses, completion, and no slow import before a job runs."""

from __future__ import annotations

import argparse
import errno
import json
import subprocess
import sys

import pytest

from blues import cli, errors
from blues.errors import BluesError, DataError

HEAVY = {"torch", "ray", "mlflow", "deepspeed", "transformers", "numpy", "pyarrow", "matplotlib", "tiktoken"}


def fake(monkeypatch, run, add_arguments=lambda parser: None, description="Do it.\n\nexample:\n  blues doit\n"):
    """A command `doit` beside the real ones."""
    command = cli.Command(name="doit", description=description, add_arguments=add_arguments, run=run)
    monkeypatch.setitem(cli._BUILT_IN, "doit", command)


def raising(error: BaseException):
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["completion", "bash"], ["verfy"]])
def test_no_slow_package_is_imported_to_parse_or_help(words):
    code = (
        "import sys, json, io, contextlib\n"
        "from blues.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "    with contextlib.suppress(SystemExit):\n"
        f"        main({words!r})\n"
        "print(json.dumps(sorted(name.partition('.')[0] for name in sys.modules)))\n"
    )
    loaded = json.loads(subprocess.check_output([sys.executable, "-c", code]))
    assert not set(loaded) & HEAVY


def test_help_lists_every_job_in_the_order_of_the_journey(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    places = [text.index(f"\n    {name} ") for name in cli.job_names() if len(name) < 9]
    assert places == sorted(places)
    assert cli.job_names()[0] == "prepare" and set(cli.JOURNEY) == set(cli.job_names())


@pytest.mark.parametrize("name", cli.command_names())
def test_every_command_has_a_summary_an_example_and_explained_options(name):
    command = cli.command(name)
    assert 10 < len(command.summary) < 120
    assert f"blues {name}" in command.description, "the docstring needs an example"
    for action in cli.job_parser(name)._actions:
        assert action.help and action.help[0].isalnum() or action.help is argparse.SUPPRESS, (
            f"{action.dest} has no help"
        )
    assert cli.job_parser(name).format_help()


def test_defaults_are_shown_where_they_say_something(monkeypatch, capsys):
    def add_arguments(parser):
        parser.add_argument("--weight", type=float, default=0.5, help="a share")
        parser.add_argument("--none", help="an optional thing")
        parser.add_argument("--zero", type=int, default=0, help="a count")
        parser.add_argument("--flag", action="store_true", help="a switch")

    fake(monkeypatch, lambda args: 0, add_arguments)
    with pytest.raises(SystemExit):
        cli.main(["doit", "--help"])
    text = capsys.readouterr().out
    assert "a share (default: 0.5)" in text and "a count (default: 0)" in text
    assert "an optional thing (default" not in text and "a switch (default" not in text
    assert "example:\n  blues doit\n" in text


@pytest.mark.parametrize("kind", [error for error in vars(errors).values() if isinstance(error, type)])
def test_a_mistake_of_the_person_is_one_sentence_and_status_2(monkeypatch, capsys, kind):
    fake(monkeypatch, raising(kind("row 7 of notes.csv has no column 'text'; name one with --text-column")))
    assert issubclass(kind, BluesError)
    assert cli.main(["doit"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "blues doit: row 7 of notes.csv has no column 'text'; name one with --text-column\n"


@pytest.mark.parametrize("words", [["--debug", "doit"], ["doit", "--debug"]])
def test_debug_shows_the_traceback(monkeypatch, capsys, words):
    fake(monkeypatch, raising(DataError("no such file")))
    assert cli.main(words) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_ctrl_c_is_130_and_a_bug_keeps_its_traceback(monkeypatch):
    fake(monkeypatch, raising(KeyboardInterrupt()))
    assert cli.main(["doit"]) == 130
    fake(monkeypatch, raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["doit"])


def test_a_path_that_cannot_be_used_is_one_sentence(monkeypatch, capsys):
    for error in (
        OSError(errno.ENOSPC, "No space left on device", "/data/x"),
        PermissionError(13, "denied", "/data/x"),
        FileNotFoundError(2, "No such file or directory", "/data/x"),
        NotADirectoryError(20, "Not a directory", "/data/x"),
    ):
        fake(monkeypatch, raising(error))
        assert cli.main(["doit"]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("blues doit: cannot read or write '/data/x': ") and shown.count("\n") == 1
        assert cli.main(["doit", "--debug"]) == 2
        assert "Traceback" in capsys.readouterr().err


def test_the_status_of_the_job_is_the_status_of_the_command(monkeypatch):
    fake(monkeypatch, lambda args: 7)
    assert cli.main(["doit"]) == 7


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m blues.cli variants | head -1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert ended.stderr == "" and ended.returncode in (0, 141)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "unknown command 'trian'. Did you mean 'train'?"),
        (
            ["train", "tiny", "--data-cach-dir", "x"],
            "unknown argument '--data-cach-dir'. Did you mean '--data-cache-dir'?",
        ),
        (["completion", "fish"], "invalid choice: 'fish'"),
    ],
)
def test_a_wrong_word_names_the_nearest_and_is_status_2(capsys, words, sentence):
    try:
        status = cli.main(words)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert sentence in capsys.readouterr().err


def test_options_and_overrides_come_in_any_order():
    for words in (
        ["tiny", "a.b=1", "--data-cache-dir", "d", "c=2"],
        ["--data-cache-dir", "d", "tiny", "a.b=1", "c=2"],
        ["tiny", "--data-cache-dir", "d", "a.b=1", "c=2"],
    ):
        args = cli.job_parser("train").parse(words)
        assert (args.experiment, args.data_cache_dir, args.overrides) == ("tiny", "d", ["a.b=1", "c=2"])


def test_train_without_a_name_is_blues01(capsys):
    """The words of Blues-01: `train --data-cache-dir DIR`."""
    assert cli.job_parser("train").parse(["--data-cache-dir", "d"]).experiment == "blues01"
    for words in (
        ["train", "--data-cache-dir", "nowhere"],
        ["train", "training.steps=3", "--data-cache-dir", "nowhere"],
    ):
        assert cli.main(words) == 2
        assert capsys.readouterr().err.startswith("blues train: dataset 'nowhere' does not exist")


def test_submit_keeps_its_own_options_and_hands_the_others_on():
    args = cli.job_parser("submit").parse(
        ["train", "tiny", "--data-cache-dir", "d", "--address", "http://h:8265", "steps=1", "--", "--address", "auto"]
    )
    assert (args.job, args.address) == ("train", "http://h:8265")
    assert args.job_arguments == ["tiny", "--data-cache-dir", "d", "steps=1", "--address", "auto"]


def test_submit_refuses_here_what_the_job_would_refuse_there(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["submit", "train", "tiny", "--data-cach-dir", "d"])
    assert ended.value.code == 2 and "Did you mean '--data-cache-dir'" in capsys.readouterr().err
    assert cli.main(["submit", "trian"]) == 2
    assert "'trian' is not a job that can be submitted. Did you mean 'train'?" in capsys.readouterr().err
    assert cli.main(["submit", "train", "tiny", "--no-wait"]) == 2
    assert "--no-wait needs --address" in capsys.readouterr().err


def test_the_bash_completion_names_commands_and_options_and_is_valid(tmp_path):
    script = subprocess.check_output([sys.executable, "-m", "blues.cli", "completion", "bash"], text=True)
    for name in cli.command_names():
        assert name in script
    assert "--data-cache-dir" in script and "--temperature" in script
    (tmp_path / "completion.bash").write_text(script)
    # ask bash itself: what completes `blues tr` and `blues train --data`?
    for line, expected in (("blues tr", "train"), ("blues train --data", "--data-cache-dir")):
        words = line.split()
        ask = (
            f"source {tmp_path}/completion.bash; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'; "
            f"COMP_POINT=${{#COMP_LINE}}; _shtab_blues blues '{words[-1]}' '{words[-2]}'; echo ${{COMPREPLY[@]}}"
        )
        assert expected in subprocess.check_output(["bash", "-c", ask], text=True).split()


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_complete_too(capsys, shell):
    assert cli.main(["completion", shell]) == 0
    assert "prepare" in capsys.readouterr().out


def test_variants_lists_families_members_fields_and_defaults(capsys):
    assert cli.main(["variants", "router"]) == 0
    text = capsys.readouterr().out
    assert "noisy_top_k" in text and "softmax_top_k" in text and "noise = 1.0" in text
    assert cli.main(["variants"]) == 0
    everything = capsys.readouterr().out
    assert "noise = 1.0" not in everything, "without a family named, a line for each member"
    for family in ("optimizer", "schedule", "rope", "attention_pattern"):
        assert f"{family}: " in everything


@pytest.mark.parametrize("name", cli.job_names())
def test_every_job_also_runs_as_a_module_and_as_a_file(name):
    module = f"jobs.{cli.module_name(name)}"
    for command in (["-m", module], [str(cli.import_module(module).__file__)]):
        ended = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True)
        assert ended.returncode == 0 and ended.stdout.startswith(f"usage: blues {name}"), ended.stderr
