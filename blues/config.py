"""The configuration system: one tree of frozen dataclasses.

In: Python values, YAML files, `path.to.field=value` strings. Out: validated, immutable `Config` objects that can be
dumped, fingerprinted, compared, and built into the classes that own them.

- A class owns its configuration: inside `class MoE(Configurable)` lives `@configclass class Config(Config)`, and
  `config.build(**runtime)` makes `MoE(config, **runtime)`.
- A family of variants is a `Configurable` with `family="router"`; each member is declared with
  `variant="noisy_top_k"`. In YAML the member is named by the key `variant`; its own fields stand beside it.
- Unknown keys, unknown variants and values of the wrong type raise `ConfigError` with the full dotted path and the
  nearest valid name.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from blues.errors import ConfigError

VARIANT_KEY = "variant"
ConfigT = TypeVar("ConfigT", bound="Config")


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def configclass(cls: type[ConfigT]) -> type[ConfigT]:
    """Make `cls` a frozen, keyword-only dataclass; every `Config` subclass is decorated with it."""
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


class Config:
    """Base of every configuration. Subclasses check their values in `__post_init__` and raise `ConfigError`."""

    _owner: ClassVar[type | None] = None
    _variant: ClassVar[str | None] = None

    def build(self, **runtime: Any) -> Any:
        """Make the object that owns this configuration. Runtime arguments never repeat a field."""
        if self._owner is None:
            raise TypeError(f"{type(self).__qualname__} has no owner: it holds settings only and builds nothing")
        return self._owner(self, **runtime)

    def replace(self: ConfigT, **changes: Any) -> ConfigT:
        """A copy with some direct fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def override(self: ConfigT, changes: Mapping[str, Any]) -> ConfigT:
        """A copy with fields changed by dotted path, e.g. `{"model.moe.top_k": 1}`. Values are type-checked."""
        tree = dump(self)
        for path, value in changes.items():
            tree = _assign(type(self), tree, path.split("."), value, path)
        return load(type(self), tree)


class Configurable:
    """A class that owns a nested `Config`. Declare a family with `family=`, its members with `variant=`."""

    Config: ClassVar[type[Config]]
    config: Any
    family: ClassVar[str | None] = None
    variants: ClassVar[dict[str, type[Configurable]]]

    def __init_subclass__(cls, *, family: str | None = None, variant: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if family is not None:
            cls.family = family
            cls.variants = {}
            FAMILIES[family] = cls
        own = cls.__dict__.get("Config")
        if variant is None:
            if own is not None:
                own._owner = cls
            return
        if cls.family is None:
            raise TypeError(f"{cls.__name__}: variant={variant!r} needs a base class declared with family=")
        if own is None:  # a member without fields of its own still needs its own type to be told apart
            own = configclass(type("Config", (cls.Config,), {"__module__": cls.__module__, "__doc__": cls.__doc__}))
            own.__qualname__ = f"{cls.__qualname__}.Config"
            cls.Config = own
        other = cls.variants.get(variant)
        if other is not None and other.__qualname__ != cls.__qualname__:
            raise TypeError(f"{cls.family} variant {variant!r} is already registered by {other.__qualname__}")
        own._owner, own._variant = cls, variant
        cls.variants[variant] = cls


FAMILIES: dict[str, type[Configurable]] = {}
"""Every family by name; `FAMILIES["router"].variants` lists its registered classes."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """` Did you mean 'x'?` or the list of choices, for an error about an unknown `name`."""
    options = sorted(choices)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Choose from: {', '.join(options)}." if options else ""


def fields_of(cls: type[Config]) -> dict[str, dataclasses.Field]:
    """The fields of a configuration class by name, in order of declaration."""
    return {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


def dump(config: Config) -> dict[str, Any]:
    """A tree of plain dicts, lists and scalars from which `load` makes an equal `config`."""
    tree: dict[str, Any] = {}
    if config._variant is not None:
        tree[VARIANT_KEY] = config._variant
    for name in fields_of(type(config)):
        tree[name] = _plain(getattr(config, name))
    return tree


def load(cls: type[ConfigT], tree: Mapping[str, Any], path: str = "") -> ConfigT:
    """Make a `cls` from a tree as `dump` gives it; missing keys take their defaults.

    Raises:
        ConfigError: an unknown key or variant (with the nearest name), a missing or mistyped value, with its path.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path or cls.__qualname__}: expected a mapping of fields, got {tree!r}")
    values = dict(tree)
    cls = _resolve_variant(cls, values, path)
    fields, hints = fields_of(cls), typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise ConfigError(f"unknown key {_join(path, str(key))!r}.{nearest(str(key), fields)}")
    built = {key: _coerce(hints[key], value, _join(path, key)) for key, value in values.items()}
    required = [
        name
        for name, field in fields.items()
        if name not in built and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if required:
        raise ConfigError(f"missing value for {_join(path, required[0])!r}")
    try:
        return cls(**built)
    except ConfigError as error:
        message = str(error)
        raise ConfigError(f"{path}: {message}" if path and not message.startswith(path) else message) from None


def to_yaml(config: Config) -> str:
    """The fully resolved tree as YAML (non-ASCII text escaped: unescaped, PyYAML loses the line separator U+0085)."""
    return yaml.safe_dump(dump(config), sort_keys=False)


def from_yaml(cls: type[ConfigT], text: str, where: str = "configuration") -> ConfigT:
    """Inverse of `to_yaml`. `where` names the source in errors."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} must hold a mapping of configuration keys, got {type(tree).__name__}")
    try:
        return load(cls, tree)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def save(config: Config, path: str | Path) -> None:
    """Write the tree as YAML, atomically: a temporary name, fsync, rename."""
    write_atomic(path, to_yaml(config).encode())


def read(cls: type[ConfigT], path: str | Path) -> ConfigT:
    """Read a tree written by `save`, or a hand-written file with some of its keys."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read configuration {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"configuration {str(path)!r} is not UTF-8 text; save it as UTF-8 YAML") from None
    return from_yaml(cls, text, where=str(path))


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write a whole file or nothing: temporary name in the same folder, fsync, rename, fsync of the folder."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def fsync_folder(path: str | Path) -> None:
    """Make the names in a folder durable: files that were made, renamed or removed in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """`["model.moe.top_k=1", "training.optimizer.lr=3e-4"]` -> `{path: value}`; values are read as YAML scalars."""
    changes: dict[str, Any] = {}
    for argument in arguments:
        path, separator, text = argument.partition("=")
        if not separator or not path.strip():
            raise ConfigError(f"override {argument!r} must have the form path.to.field=value")
        try:
            changes[path.strip()] = yaml.safe_load(text) if text else ""
        except yaml.YAMLError:
            changes[path.strip()] = text
    return changes


def flatten(config: Config) -> dict[str, Any]:
    """Every leaf of the tree by dotted path, e.g. `{"model.moe.router.variant": "noisy_top_k", ...}`."""
    flat: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, child in value.items():
                walk(child, _join(path, key))
        else:
            flat[path] = value

    walk(dump(config), "")
    return flat


def difference(first: Config, second: Config) -> dict[str, tuple[Any, Any]]:
    """The dotted paths in which two trees differ, with both values (None where a side lacks the path)."""
    left, right = flatten(first), flatten(second)
    paths = list(left) + [path for path in right if path not in left]
    return {path: (left.get(path), right.get(path)) for path in paths if left.get(path) != right.get(path)}


def fingerprint(config: Config) -> str:
    """12 hexadecimal digits (48 bits of SHA-256) that change with any value of the tree."""
    canonical = json.dumps(dump(config), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return dump(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(child) for child in value]
    return str(value) if isinstance(value, Path) else value


def _resolve_variant(cls: type[ConfigT], values: dict[str, Any], path: str) -> type[ConfigT]:
    """The class that `values["variant"]` names within the family of `cls`; removes the key."""
    owner = cls._owner
    family = getattr(owner, "family", None)
    if family is None:
        return cls
    name = values.pop(VARIANT_KEY, cls._variant)
    variants = owner.variants  # type: ignore[union-attr]
    if name not in variants:
        raise ConfigError(f"unknown {family} {name!r} at {path or cls.__qualname__!r}.{nearest(str(name), variants)}")
    return variants[name].Config


def _config_type(hint: Any) -> type[Config] | None:
    """The Config class inside a type hint (`X.Config` or `X.Config | None`), if there is one."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if isinstance(option, type) and issubclass(option, Config):
            return option
    return None


def _coerce(hint: Any, value: Any, path: str) -> Any:
    """Check `value` against the type `hint`; widen int to float, lists to tuples, trees to Configs."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        failure: ConfigError | None = None
        for option in arguments:
            if option is type(None):
                continue
            try:
                return _coerce(option, value, path)
            except ConfigError as error:
                failure = failure or error
        raise failure or ConfigError(f"{path}: {value!r} does not fit {hint}")
    if origin is typing.Literal:
        if value in arguments and not (isinstance(value, bool) and True not in arguments and False not in arguments):
            return value
        if isinstance(value, bool) and "off" in arguments:  # YAML 1.1 reads a bare off/on as a boolean
            return _coerce(hint, "on" if value else "off", path)
        raise ConfigError(f"{path}: {value!r} is not one of {', '.join(map(repr, arguments))}")
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}: expected a list, got {value!r}")
        items = [_coerce(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a mapping, got {value!r}")
        return {str(key): _coerce(arguments[1], item, _join(path, str(key))) for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Config):
        if isinstance(value, Config):
            value = dump(value)
        if isinstance(value, str):
            value = {VARIANT_KEY: value}
        return load(hint, value, path)
    return _scalar(hint, value, path)


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is float and not isinstance(value, bool):
        try:  # YAML 1.1 reads 3e-4 as text
            return float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{path}: expected a number, got {value!r}") from None
    if hint is int and isinstance(value, str):
        try:
            return int(value.replace("_", ""))
        except ValueError:
            pass
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{path}: expected {hint.__name__}, got {value!r}")
    return value


def _assign(cls: type[Config], tree: Any, keys: list[str], value: Any, path: str) -> Any:
    """A copy of `tree` (a dump of `cls`) with the value at `keys` replaced; naming a variant resets its fields."""
    if not isinstance(tree, dict):
        raise ConfigError(f"cannot set {path!r}: {'.'.join(path.split('.')[: -len(keys)])!r} is {tree!r}")
    key, rest = keys[0], keys[1:]
    values = dict(tree)
    cls = _resolve_variant(cls, dict(tree), path)
    fields, hints = fields_of(cls), typing.get_type_hints(cls)
    if key == VARIANT_KEY and not rest and cls._variant is not None:
        return {VARIANT_KEY: value}
    if key not in fields:
        raise ConfigError(f"unknown key {path!r}: {cls.__qualname__} has no {key!r}.{nearest(key, fields)}")
    child = _config_type(hints[key])
    if not rest:
        values[key] = {VARIANT_KEY: value} if child is not None and isinstance(value, str) else _plain(value)
    elif child is not None:
        values[key] = _assign(child, values[key] or {}, rest, value, path)
    elif isinstance(values[key], dict):
        values[key] = {**values[key], ".".join(rest): value}
    else:
        raise ConfigError(f"cannot set {path!r}: {key!r} is not a group of settings")
    return values
