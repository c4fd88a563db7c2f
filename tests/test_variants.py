"""Every registered class names its source, is reached from the command line, and stands in the README's table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blues import cli, variants
from blues.config import FAMILIES, dump
from blues.errors import ConfigError
from tuning.experiments import resolve
from tuning.spaces import SPACES, parse

README = Path(__file__).parent.parent / "README.md"
ALL = variants.families()
MEMBERS = [(family, member) for family in ALL for member in family.members]
BY_NAME = {family.name: family for family in ALL}

TOGETHER = {
    "all_of": {"patterns": ["causal", {"variant": "sliding_window", "window": 8}]},
    "any_of": {"patterns": ["causal", {"variant": "sliding_window", "window": 8}]},
    "by_head": {"patterns": ["causal", {"variant": "sliding_window", "window": 8}]},
    "by_layer": {"patterns": ["causal", {"variant": "sliding_window", "window": 8}]},
}
"""What a member cannot go without, by name."""


def title(value) -> str:
    return value.name


@pytest.mark.parametrize(("family", "member"), MEMBERS, ids=title)
def test_the_first_line_of_every_member_names_its_source(family, member):
    assert variants.names_source(member.summary), (
        f"{member.module}: the docstring of {family.name} {member.name!r} must name its source in its first line: "
        f"an arXiv number in parentheses, or one of {variants.OWN}"
    )
    assert member.source and member.what and len(member.summary) <= 120
    assert member.source not in member.what


@pytest.mark.parametrize("family", ALL, ids=title)
def test_every_family_says_what_it_is_and_what_chooses_it(family):
    assert family.members and family.chosen_by and len(family.summary) > 10


@pytest.mark.parametrize(
    ("family", "member"), [pair for pair in MEMBERS if pair[0].name not in variants.BY_COMMAND], ids=title
)
def test_every_member_is_chosen_by_a_dotted_override(family, member):
    path, _, inner = family.settings[0].partition("[]")
    chosen = {"variant": member.name, **TOGETHER.get(member.name, {})}
    if family.name == variants.BACKENDS_FAMILY:  # a name, without settings of its own
        chosen = member.name
    for part in reversed(inner.split(".")[1:]):  # a setting of a member of another family, which stands in a list
        owner = next(name for name, other in BY_NAME.items() if f"{path}[]" in other.settings)
        holder = next(each for each in BY_NAME[owner].members if part in each.fields)
        chosen = {"variant": holder.name, part: chosen}
    experiment = resolve("blues01").override({path: [chosen] if "[]" in family.settings[0] else chosen})
    key = "backend" if family.name == variants.BACKENDS_FAMILY else "variant"
    assert f"'{key}': '{member.name}'" in repr(dump(experiment))


def test_the_settings_are_found_in_optional_fields_lists_and_other_members():
    assert BY_NAME["router"].settings == ("model.moe.router",)
    assert BY_NAME["shared_experts"].settings == ("model.moe.shared_experts",)
    assert BY_NAME["routing_rule"].chosen_by == "model.moe.rules=[NAME]"
    assert "model.moe.router.schedule" in BY_NAME["router_noise"].settings
    assert BY_NAME["pruning_criterion"].chosen_by == "blues prune --criterion NAME"


SWEPT = {"attention_pattern": {"block_list", "entropy_window", "prefix_syntax"}}
"""Members that no space can hold: made from a trained model, or in need of trees."""


@pytest.mark.parametrize("name", sorted(set(SPACES) & set(FAMILIES)))
def test_the_space_of_a_family_has_every_member(name):
    base = resolve("blues01")
    varied = [repr(dump(base.override(point))) for point in parse(name, base)]
    for member in BY_NAME[name].members:
        if member.name not in SWEPT.get(name, ()):
            assert any(f"'variant': '{member.name}'" in tree for tree in varied), member.name


def test_a_summary_is_parted_into_what_it_is_and_whose():
    def of(summary):
        member = variants.Member("x", summary, "m", {})
        return member.what, member.source

    assert of("Gates (a note) by noise (Shazeer et al., arXiv 1701.06538, eq. 3).") == (
        "Gates (a note) by noise",
        "Shazeer et al., arXiv 1701.06538, eq. 3",
    )
    assert of("A (X, arXiv 2310.06825), and f(z) (Y, 2309.17453).") == (
        "A, and f(z)",
        "X, arXiv 2310.06825; Y, 2309.17453",
    )
    assert of("A mask of trees (Blues' own).") == ("A mask of trees", "Blues' own")
    assert not variants.names_source("In 2024 something with 1.5 experts.")


def test_the_readme_has_the_table_of_what_is_registered():
    text = README.read_text(encoding="utf-8")
    assert variants.updated(text, ALL, "README.md") == text, "run: blues variants --update README.md"


def test_a_table_is_renewed_in_place_and_only_between_its_marks(tmp_path, capsys):
    document = tmp_path / "notes.md"
    document.write_text(f"before\n{variants.BEGIN}\nthe old table\n{variants.END}\nafter\n")
    assert cli.main(["variants", "--update", str(document)]) == 0
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "the old table" not in text
    assert "| `router` | `adaptive_top_k` |" in text and "[2403.07652](https://arxiv.org/abs/2403.07652)" in text
    assert "renewed" in capsys.readouterr().out and not variants.update(document)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {5}


@pytest.mark.parametrize(
    "text", ["", variants.BEGIN, f"{variants.END}{variants.BEGIN}", variants.BEGIN * 2 + variants.END]
)
def test_a_document_without_its_marks_is_refused_and_left_alone(tmp_path, text):
    document = tmp_path / "notes.md"
    document.write_text(text)
    with pytest.raises(ConfigError, match="notes.md' must have the line"):
        variants.update(document)
    assert document.read_text() == text
    with pytest.raises(ConfigError, match="cannot read"):
        variants.update(tmp_path / "nowhere.md")


def test_a_program_gets_the_same(capsys):
    assert cli.main(["variants", "router", "rope", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert [family["family"] for family in tree] == ["rope", "router"]
    noisy = next(member for member in tree[1]["members"] if member["name"] == "noisy_top_k")
    assert noisy["arxiv"] == ["1701.06538"] and noisy["fields"]["noise"] == 1.0


def test_names_are_checked(capsys):
    assert cli.main(["variants", "ruoter"]) == 2
    assert "unknown family 'ruoter'. Did you mean 'router'?" in capsys.readouterr().err
    assert cli.main(["variants", "router", "--update", "x.md"]) == 2
    assert "name none" in capsys.readouterr().err
