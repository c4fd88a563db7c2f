"""What an experiment can choose: every registered class, with its source and the setting that chooses it.

In: the families of `blues.config`, and the attention backends, which are functions. Out: `Family` values, as lines for
a terminal, as JSON, and as the table that stands in a document between two marks.

The first line of a member's docstring is where everything here comes from: it says what the member is, and in
parentheses whose it is (a paper, an arXiv number) or that it is of this project.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from blues import config as cfg
from blues.config import FAMILIES, Config, Configurable, fields_of, nearest
from blues.errors import ConfigError

REGISTERING = (
    "blues.experiment",
    "blues.model.moe.pruning",
    "blues.evaluation.positions",
    "blues.evaluation.retrieval",
)
"""Modules that import every registered class."""

OWN = ("this project", "Blues' own")
"""How a first line says that an idea is of nobody else."""
BACKENDS_FAMILY = "attention_backend"
BY_COMMAND = {
    "pruning_criterion": "blues prune --criterion NAME",
    "pruning_action": "blues prune --action NAME",
    "redirect": "blues prune",
    "long_context": "blues evaluate --long-context NAME",
}
"""What chooses where it is not a setting, or where setting it by hand alone makes no model."""
ARXIV = re.compile(r"(?:arXiv )?\b(\d{4}\.\d{4,5})\b")
BEGIN, END = "<!-- variants: made by `blues variants --update FILE` -->", "<!-- /variants -->"
"""The marks between which a document has the table."""


@dataclass(frozen=True)
class Member:
    """One registered class. summary: first line of its docstring. fields: its settings and their defaults."""

    name: str
    summary: str
    module: str
    fields: Mapping[str, Any]

    @property
    def source(self) -> str:
        """Whose it is: the parentheses of the summary that name a source, else the sentence's own arXiv number."""
        named = [text for text in _parentheses(self.summary) if _names_source(text)]
        return "; ".join(named) or "; ".join(f"arXiv {number}" for number in ARXIV.findall(self.summary))

    @property
    def what(self) -> str:
        """The summary without its source."""
        text = self.summary
        for inner in _parentheses(text):
            if _names_source(inner):
                text = text.replace(f" ({inner})", "", 1)
        return text.rstrip(".")


@dataclass(frozen=True)
class Family:
    """Variants of one thing. settings: dotted paths of an experiment that choose one of them (those that end in `[]`
    hold a list of them); none where a command chooses."""

    name: str
    summary: str
    settings: tuple[str, ...]
    members: tuple[Member, ...]

    @property
    def chosen_by(self) -> str:
        """How a person chooses a member, in words."""
        written = [f"{path[:-2]}=[NAME]" if path.endswith("[]") else f"{path}=NAME" for path in self.settings]
        return BY_COMMAND.get(self.name) or " or ".join(written)

    def tree(self) -> dict[str, Any]:
        """Plain values for JSON."""
        members = [
            {
                "name": member.name,
                "what": member.what,
                "source": member.source,
                "arxiv": ARXIV.findall(member.summary),
                "module": member.module,
                "fields": {name: _plain(value) for name, value in member.fields.items()},
            }
            for member in self.members
        ]
        return {"family": self.name, "summary": self.summary, "settings": list(self.settings), "members": members}


def families(names: Sequence[str] = ()) -> list[Family]:
    """The families of these names (all if none is given), by name.

    Raises:
        ConfigError: a family that does not exist; names the nearest.
    """
    for module in REGISTERING:
        import_module(module)
    # A family that somebody's own script or test registers is not one of Blues.
    own = (name for name, family in FAMILIES.items() if family.__module__.partition(".")[0] == "blues")
    everything = [*own, BACKENDS_FAMILY]
    for name in names:
        if name not in everything:
            raise ConfigError(f"unknown family {name!r}.{nearest(name, everything)}")
    paths = _paths()
    return [
        _backends() if name == BACKENDS_FAMILY else _registered(name, paths.get(name, ()))
        for name in sorted(names or everything)
    ]


def _registered(name: str, settings: Sequence[str]) -> Family:
    members = [
        Member(variant, first_line(member), member.__module__, _defaults(member.Config))
        for variant, member in sorted(FAMILIES[name].variants.items())
    ]
    return Family(name, first_line(FAMILIES[name]), tuple(settings), tuple(members))


def _backends() -> Family:
    from blues.kernels.attention import BACKENDS

    members = [
        Member(name, first_line(backend.attend), backend.attend.__module__, {}) for name, backend in BACKENDS.items()
    ]
    summary = "What computes attention: `auto` takes the fastest that supports the case."
    return Family(BACKENDS_FAMILY, summary, ("model.attention.backend",), tuple(members))


def lines(found: Sequence[Family], *, settings: bool) -> Iterator[str]:
    """For a terminal: a line for each member, and one for each of its settings if they are asked for."""
    for family in found:
        yield f"{family.name}: {family.summary}  [{family.chosen_by}]"
        width = max(len(member.name) for member in family.members)
        for member in family.members:
            yield f"  {member.name:<{width}}  {member.summary}"
            if settings:
                for name, value in member.fields.items():
                    yield f"  {'':<{width}}    {name} = {'(required)' if value is MISSING else repr(value)}"
        yield ""


def markdown(found: Sequence[Family]) -> str:
    """A table: family, name, what it is, source; arXiv numbers are links."""
    rows = ["| family | name | what | source |", "| --- | --- | --- | --- |"]
    for family in found:
        for place, member in enumerate(family.members):
            head = f"`{family.name}`" if place == 0 else ""
            source = ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", _cell(member.source))
            rows.append(f"| {head} | `{member.name}` | {_cell(member.what)} | {source} |")
    return "\n".join(rows)


def updated(text: str, found: Sequence[Family], where: str = "the document") -> str:
    """`text` with the table of these families between its marks.

    Raises:
        ConfigError: the marks are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ConfigError(f"{where} must have the line {BEGIN!r} and after it the line {END!r}, once each")
    return f"{before}{BEGIN}\n\n{markdown(found)}\n\n{END}{after}"


def update(path: str | Path) -> bool:
    """Renew the table of a document. Whether it changed.

    Raises:
        ConfigError: the document cannot be read, or has no marks.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}; name a text file that has the marks") from None
    renewed = updated(text, families(), repr(str(path)))
    if renewed != text:
        cfg.write_atomic(path, renewed.encode())
    return renewed != text


def first_line(thing: type[Configurable] | Callable[..., Any]) -> str:
    """Of the docstring that a class (not its base) or a function has itself; empty without one."""
    own = thing.__dict__.get("__doc__") if isinstance(thing, type) else thing.__doc__
    return (own or "").strip().partition("\n")[0]


def names_source(summary: str) -> bool:
    """Whether a first line says whose the idea is: an arXiv number, or that it is of this project or common usage."""
    return _names_source(summary)


def _names_source(text: str) -> bool:
    return bool(ARXIV.search(text)) or any(words in text for words in OWN)


def _parentheses(text: str) -> list[str]:
    """What stands in outermost parentheses."""
    found, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        if letter == "(":
            depth += 1
            start = place + 1 if depth == 1 else start
        elif letter == ")" and depth:
            depth -= 1
            if depth == 0:
                found.append(text[start:place])
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _defaults(config: type[Config]) -> dict[str, Any]:
    found = {}
    for field in fields_of(config).values():
        made = callable(field.default_factory)
        found[field.name] = field.default_factory() if made else field.default  # type: ignore[operator]
    return found


def _plain(value: Any) -> Any:
    if value is MISSING:
        return None
    if isinstance(value, Config):
        return cfg.dump(value)
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _paths() -> dict[str, list[str]]:
    """The settings of an experiment that choose a member of a family, those of other members included."""
    from blues.experiment import Experiment

    found: dict[str, list[str]] = {}
    _walk(Experiment, "", found, frozenset())
    return found


def _walk(config: type[Config], path: str, found: dict[str, list[str]], inside: frozenset[str]) -> None:
    for name, hint in typing.get_type_hints(config).items():
        if name not in fields_of(config):
            continue
        here = f"{path}.{name}" if path else name
        for option, listed in _configs_of(hint):
            place = f"{here}[]" if listed else here
            family = getattr(option._owner, "family", None)
            if family is None:
                _walk(option, place, found, inside)
            elif family not in inside:
                if place not in found.setdefault(family, []):
                    found[family].append(place)
                for member in FAMILIES[family].variants.values():
                    _walk(member.Config, place, found, inside | {family})


def _configs_of(hint: Any, listed: bool = False) -> Iterator[tuple[type[Config], bool]]:
    """The configurations in a type hint, each with whether it stands in a list."""
    if isinstance(hint, type) and issubclass(hint, Config):
        yield hint, listed
        return
    many = typing.get_origin(hint) in (tuple, list)
    for option in typing.get_args(hint):
        yield from _configs_of(option, listed or many)
