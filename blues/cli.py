"""The command line: `blues COMMAND ...`.

In: the words a person typed. Out: an exit status, with everything else done by the job of that name.

A command is a module of `jobs/` with a docstring (what it does, and an example), `add_arguments(parser)` and
`run(args) -> int`; a new file there is a new command. Two commands live here because they describe Blues itself:
`variants` and `completion`. Neither this module nor a job imports torch, Ray or MLflow before a job runs, so that help
and completion answer at once.

Exit statuses: what the job returns (0 is success); 2 for anything the person can mend (`BluesError`, wrong usage);
130 for Ctrl-C. `--debug` shows the traceback behind a sentence.
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from blues import __version__
from blues.config import nearest
from blues.errors import BluesError, ConfigError

JOURNEY = (
    "prepare",
    "dedup",
    "merge",
    "verify",
    "inspect",
    "train",
    "sweep",
    "generate",
    "evaluate",
    "extend",
    "prune",
    "export",
    "benchmark",
    "ui",
    "submit",
    "demo",
)
"""The order in which help lists the jobs: the order in which data travels."""

FORWARDED = "job_arguments"
"""A job that hands unknown options on (`submit`) declares `parser.set_defaults(job_arguments=())`."""

_ABOUT = "Blues: experiments with a Mixture-of-Experts language model, on a laptop or on a Ray cluster."
_EXAMPLES = """\
examples:
  blues demo                                       the whole journey on real data, in minutes
  blues prepare --dataset notes.csv --data-cache-dir data/notes
  blues train tiny --data-cache-dir data/notes --run-dir runs/notes
  blues generate --checkpoint runs/notes --prompt "Once upon"
  blues COMMAND --help                             every option with its default, and an example
"""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: `description` (its first line is the summary), how it declares arguments, how it runs."""

    name: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]

    @property
    def summary(self) -> str:
        return self.description.strip().partition("\n")[0]


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' line breaks and appends the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        says_nothing = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        positional = not action.option_strings and action.nargs not in ("?", "*")
        if says_nothing or positional or action.default in ("", [], ()) or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts options and `key=value` words in any order and names the nearest option."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nSee: {self.prog} --help\n")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of `argv`, or leave what is unknown in `job_arguments` if the job declared it."""
        if "-h" in argv or "--help" in argv:  # asked before argparse hides the positionals to mix them with options
            self.print_help()
            self.exit()
        if self.get_default(FORWARDED) is not None:
            own, separator, rest = _partition(list(argv), "--")
            args, unknown = self.parse_known_args(own)
            setattr(args, FORWARDED, [*unknown, *rest])
            return args
        args, unknown = self.parse_known_intermixed_args(list(argv))
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            word = unknown[0]
            hint = nearest(word.partition("=")[0], options) if word.startswith("-") else ""
            self.error(f"unknown argument {word!r}.{hint if 'Did you mean' in hint else ''}")
        return args


def _partition(words: list[str], separator: str) -> tuple[list[str], bool, list[str]]:
    if separator not in words:
        return words, False, []
    at = words.index(separator)
    return words[:at], True, words[at + 1 :]


def job_names() -> list[str]:
    """The commands that modules of `jobs/` are, in the order of the journey."""
    found = [module.name.removesuffix("_") for module in pkgutil.iter_modules(import_module("jobs").__path__)]
    return [name for name in JOURNEY if name in found] + sorted(name for name in found if name not in JOURNEY)


def module_name(job: str) -> str:
    """The module of `jobs/` that a job is: its name, with _ behind one that Python's own library has (`inspect`).

    Where a job is started as a file, its folder is where Python looks first, for its own modules too."""
    return f"{job}_" if job in sys.stdlib_module_names else job


def command_names() -> list[str]:
    """The names of every command: the jobs, then the commands about Blues itself."""
    return [*job_names(), *_BUILT_IN]


def command(name: str) -> Command:
    """The command of this name.

    Raises:
        ConfigError: no such command; names the nearest.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    names = command_names()
    if name not in names:
        raise ConfigError(f"unknown command {name!r}.{nearest(name, names)}")
    module = import_module(f"jobs.{module_name(name)}")
    return Command(name=name, description=module.__doc__ or "", add_arguments=module.add_arguments, run=module.run)


def job_parser(name: str) -> Parser:
    """The parser of one command, as `blues NAME` uses it."""
    chosen = command(name)
    parser = Parser(prog=f"blues {name}", description=chosen.description)
    _fill(parser, chosen)
    return parser


def full_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line with every command's options: what help and completion read."""
    parser = Parser(prog="blues", description=_ABOUT, epilog=_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"blues {__version__}")
    _add_debug(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name in command_names():
        chosen = command(name)
        summary = chosen.summary.replace("%", "%%")  # argparse formats help texts
        _fill(commands.add_parser(name, help=summary, description=chosen.description), chosen)
    return parser


def _fill(parser: argparse.ArgumentParser, chosen: Command) -> None:
    chosen.add_arguments(parser)
    _add_debug(parser)


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback behind an error")


def run_job(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one command with these words (the process's own if None) and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        args = job_parser(name).parse(words)
        return command(name).run(args)
    except BluesError as error:
        return _fail(name, str(error), debug)
    except KeyboardInterrupt:
        print(f"\nblues {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (`| head`) went away: nothing is left to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f" {error.filename!r}" if error.filename else ""
        return _fail(
            name,
            f"cannot read or write{where}: {error.strerror or error}; check the path, its permissions and free space",
            debug,
        )


def _fail(name: str, sentence: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"blues {name}: {sentence}" if name else f"blues: {sentence}", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """The console command `blues`."""
    words = list(sys.argv[1:] if argv is None else argv)
    position = next((index for index, word in enumerate(words) if not word.startswith("-")), None)
    if position is None:  # only options: --help, --version, or nothing at all
        parser = full_parser()
        parser.parse_args(words)
        parser.print_help()
        return 2
    name = words.pop(position)
    if name not in command_names():
        return _fail("", f"unknown command {name!r}.{nearest(name, command_names())}", debug=False)
    return run_job(name, words)


def _add_variants(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", nargs="*", help="only these families, with settings (default: all)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, settings included")
    form.add_argument("--markdown", action="store_true", help="print a table for a document")
    form.add_argument("--update", metavar="FILE", help="renew the table of all families between the marks of FILE")


def _run_variants(args: argparse.Namespace) -> int:
    from blues import variants

    if args.update:
        if args.family:
            raise ConfigError("--update writes the table of all families; name none")
        print(f"{args.update}: {'renewed' if variants.update(args.update) else 'was up to date'}")
        return 0
    found = variants.families(args.family)
    if args.json:
        print(json.dumps([family.tree() for family in found], indent=2, ensure_ascii=False))
    elif args.markdown:
        print(variants.markdown(found))
    else:
        print("\n".join(variants.lines(found, settings=bool(args.family))))
    return 0


def _add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell to complete in")


def _run_completion(args: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(full_parser(), shell=args.shell))
    return 0


_BUILT_IN = {
    "variants": Command(
        name="variants",
        description="""List every variant that an experiment can choose, with its source.

examples:
  blues variants               every family: what each member is, whose idea it is, and what chooses it
  blues variants router        the routers with their settings; choose one with model.moe.router=NAME
  blues variants rope --json   the same for a program
  blues variants --markdown    as a table
""",
        add_arguments=_add_variants,
        run=_run_variants,
    ),
    "completion": Command(
        name="completion",
        description="""Print the script that completes `blues` commands and options in a shell.

example:
  blues completion bash >> ~/.bash_completion
  blues completion zsh > "${fpath[1]}/_blues"
""",
        add_arguments=_add_completion,
        run=_run_completion,
    ),
}


if __name__ == "__main__":
    raise SystemExit(main())
