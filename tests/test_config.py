"""The configuration tree: round trips, overrides, variants, and errors that name the path and the remedy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blues import config as cfg
from blues.errors import ConfigError


class Gate(cfg.Configurable, family="test_gate"):
    @cfg.configclass
    class Config(cfg.Config):
        jitter: float = 0.0

    def __init__(self, config: Gate.Config, *, dim: int) -> None:
        self.config, self.dim = config, dim


class NoisyGate(Gate, variant="noisy"):
    @cfg.configclass
    class Config(Gate.Config):
        noise: float = 1.0

        def __post_init__(self) -> None:
            if self.noise < 0:
                raise ConfigError(f"noise must not be negative, got {self.noise}")


class PlainGate(Gate, variant="plain"):
    """A member without fields of its own."""


@cfg.configclass
class Layer(cfg.Config):
    gate: Gate.Config = NoisyGate.Config()
    top_k: int = 2
    mode: Literal["off", "on", "auto"] = "auto"


@cfg.configclass
class Stage(cfg.Config):
    start: int
    rates: tuple[float, ...] = (1.0,)


@cfg.configclass
class Tree(cfg.Config):
    name: str
    layer: Layer | None = Layer()
    rates: tuple[float, ...] = (0.1, 0.2)
    limits: dict[str, int] = dataclasses.field(default_factory=dict)
    flag: bool = False
    seed: int | None = None
    folder: Path = Path("runs")
    stages: tuple[Stage, ...] = ()


def test_build_makes_the_owner_with_its_config_and_runtime() -> None:
    gate = NoisyGate.Config(noise=0.5).build(dim=3)
    assert type(gate) is NoisyGate and gate.config.noise == 0.5 and gate.dim == 3
    assert type(PlainGate.Config().build(dim=1)) is PlainGate


def test_settings_without_an_owner_refuse_to_build() -> None:
    with pytest.raises(TypeError, match="Layer has no owner"):
        Layer().build()


def test_configs_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Layer().top_k = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Layer(PlainGate.Config())  # type: ignore[misc]


trees = st.builds(
    Tree,
    name=st.text(max_size=8),
    layer=st.none()
    | st.builds(
        Layer,
        gate=st.builds(NoisyGate.Config, noise=st.floats(0, 1e6), jitter=st.floats(allow_nan=False))
        | st.just(PlainGate.Config(jitter=0.25)),
        top_k=st.integers(),
        mode=st.sampled_from(["off", "on", "auto"]),
    ),
    rates=st.lists(st.floats(allow_nan=False), max_size=3).map(tuple),
    limits=st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    flag=st.booleans(),
    seed=st.none() | st.integers(),
    stages=st.lists(st.builds(Stage, start=st.integers()), max_size=2).map(tuple),
)


@given(trees)
def test_dump_and_yaml_round_trip(tree: Tree) -> None:
    assert cfg.load(Tree, cfg.dump(tree)) == tree
    assert cfg.from_yaml(Tree, cfg.to_yaml(tree)) == tree
    assert cfg.fingerprint(cfg.load(Tree, cfg.dump(tree))) == cfg.fingerprint(tree)


@given(trees, trees)
def test_trees_that_differ_have_other_fingerprints_and_named_differences(first: Tree, second: Tree) -> None:
    same = cfg.dump(first) == cfg.dump(second)
    assert same or cfg.fingerprint(first) != cfg.fingerprint(second)
    assert (cfg.difference(first, second) == {}) == same


def test_overrides_reach_any_depth_and_keep_the_rest() -> None:
    base = Tree(name="a")
    changes = cfg.parse_overrides(["layer.top_k=1", "layer.gate.noise=3e-4", "rates=[1, 2]", "flag=true", "seed=7"])
    changed = base.override(changes)
    assert changed.layer == Layer(gate=NoisyGate.Config(noise=3e-4), top_k=1)
    assert changed.rates == (1.0, 2.0) and changed.flag is True and changed.seed == 7
    assert base == Tree(name="a")
    assert cfg.difference(base, changed)["layer.top_k"] == (2, 1)


def test_a_list_of_groups_is_read_whole_and_its_errors_say_where() -> None:
    base = Tree(name="a")
    changed = base.override(cfg.parse_overrides(["stages=[{start: 3, rates: [1, 0]}, {start: 7}]"]))
    assert changed.stages == (Stage(start=3, rates=(1.0, 0.0)), Stage(start=7))
    assert cfg.difference(base, changed) == {
        "stages": ([], [{"start": 3, "rates": [1.0, 0.0]}, {"start": 7, "rates": [1.0]}])
    }
    for text, message in (
        ("[{strat: 3}]", r"unknown key 'stages\[0\].strat'.*Did you mean 'start'"),
        ("[{start: 1}, {rates: [1]}]", r"missing value for 'stages\[1\].start'"),
        ("[{start: x}]", r"stages\[0\].start: expected int, got 'x'"),
        ("{start: 1}", "stages: expected a list"),
        ("[1]", r"stages\[0\]: expected a mapping of fields, got 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            base.override(cfg.parse_overrides([f"stages={text}"]))


def test_naming_a_variant_by_override_gives_its_defaults() -> None:
    base = Tree(name="a", layer=Layer(gate=NoisyGate.Config(noise=9.0)))
    for path in ("layer.gate=plain", "layer.gate.variant=plain"):
        changed = base.override(cfg.parse_overrides([path]))
        assert changed.layer is not None and changed.layer.gate == PlainGate.Config()
    both = base.override(cfg.parse_overrides(["layer.gate=noisy", "layer.gate.noise=2"]))
    assert both.layer is not None and both.layer.gate == NoisyGate.Config(noise=2.0)


def test_an_absent_group_can_be_switched_off_and_set() -> None:
    off = Tree(name="a").override(cfg.parse_overrides(["layer=null"]))
    assert off.layer is None
    assert off.override({"layer.top_k": 5}).layer == Layer(top_k=5)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("layer.top_kk=1", "unknown key 'layer.top_kk'.*Did you mean 'top_k'"),
        ("layr.top_k=1", "unknown key 'layr.top_k'.*Did you mean 'layer'"),
        ("layer.gate=noisi", "unknown test_gate 'noisi'.*Did you mean 'noisy'"),
        ("layer.gate.noise=-1", "layer.gate: noise must not be negative, got -1.0"),
        ("layer.top_k=two", "layer.top_k: expected int, got 'two'"),
        ("layer.top_k=true", "layer.top_k: expected int, got True"),
        ("layer.top_k=1.5", "layer.top_k: expected int, got 1.5"),
        ("layer.mode=maybe", "layer.mode: 'maybe' is not one of 'off', 'on', 'auto'"),
        ("flag=3", "flag: expected bool, got 3"),
        ("rates=3", "rates: expected a list, got 3"),
        ("name.first=x", "cannot set 'name.first'"),
        ("top_k", "must have the form path.to.field=value"),
    ],
)
def test_bad_overrides_say_what_where_and_what_to_do(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tree(name="a").override(cfg.parse_overrides([argument]))


def test_yaml_words_for_on_and_off_are_understood() -> None:
    assert Tree(name="a").override(cfg.parse_overrides(["layer.mode=off"])).layer == Layer(mode="off")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "x.yaml is not valid YAML"),
        ("[1]", "x.yaml must hold a mapping"),
        ("layer: {top_k: 1}", "x.yaml: missing value for 'name'"),
        ("name: a\nlayer: {gate: {variant: nois}}", "x.yaml: unknown test_gate 'nois' at 'layer.gate'"),
        ("name: a\nlayer: {gate: 3}", "layer.gate: expected a mapping"),
        ("name: a\nextra: 1", "unknown key 'extra'"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        cfg.from_yaml(Tree, text, where="x.yaml")
    assert "\n" not in str(caught.value)


def test_files_round_trip_and_unreadable_ones_are_named(tmp_path: Path) -> None:
    tree = Tree(name="ünïcode", seed=3)
    cfg.save(tree, tmp_path / "tree.yaml")
    assert cfg.read(Tree, tmp_path / "tree.yaml") == tree
    assert [entry.name for entry in tmp_path.iterdir()] == ["tree.yaml"]
    with pytest.raises(ConfigError, match="cannot read configuration .*absent.yaml"):
        cfg.read(Tree, tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        cfg.read(Tree, tmp_path / "latin.yaml")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "tree.yaml"
    cfg.write_atomic(target, b"old")

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        cfg.write_atomic(target, b"new")
    assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_registering_a_name_twice_is_refused() -> None:
    with pytest.raises(TypeError, match="already registered by NoisyGate"):

        class Other(Gate, variant="noisy"):
            pass
