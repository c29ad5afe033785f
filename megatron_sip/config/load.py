"""YAML and overrides -> :class:`RunConfig`, and back to text: the file that a run keeps, and ``--help``."""

from __future__ import annotations

import difflib
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_sip.config.sections import ConfigError, Section
from megatron_sip.config.tree import RunConfig

S = typing.TypeVar("S", bound=Section)


def load_config(path: str | Path | None, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply dotted ``key=value`` overrides (values are parsed as YAML).

    A file may start from another one with ``base: other.yaml`` (relative to itself); its own keys win. Overrides win over both.
    Sections are merged key by key; lists are replaced whole.

    Raises:
        ConfigError: file missing or not YAML, unknown key (with the nearest real one), wrong value.
    """
    tree = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        key, sep, text = override.lstrip("-").partition("=")
        if not sep or not key:
            raise ConfigError(f"override {override!r} is not of the form section.key=value")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
            node = child
        node[leaf] = _merge(node[leaf], value) if isinstance(value, dict) and isinstance(node.get(leaf), dict) else value
    unknown = list(_unknown_keys(tree, RunConfig, ""))
    if unknown:
        raise ConfigError("\n".join(unknown))
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        source = f"{path}: " if path is not None else ""
        raise ConfigError(source + "\n".join(_issues(error))) from None


def parse_section(text: str, section: type[S], flag: str) -> S:
    """A section written as YAML behind a command line's ``flag``.

    Raises:
        ConfigError: not YAML, an unknown key, a wrong or missing value.
    """
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{flag} {text!r} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{flag} {text!r} must be keys and values, e.g. {flag} '{{kind: quality, model: DIR}}'")
    for key in tree:
        if key not in section.model_fields:
            near = difflib.get_close_matches(str(key), section.model_fields, 1, 0.5)
            raise ConfigError(f"{flag}: unknown key {key}; " + (f"did you mean {near[0]}?" if near else f"known here: {', '.join(section.model_fields)}"))
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{flag} {text!r}: " + "; ".join(_issues(error, whole=False))) from None


def _issues(error: ValidationError, whole: bool = True) -> list[str]:
    """One line a problem; ``whole`` quotes the value even where it is a whole section."""
    lines = []
    for issue in error.errors():
        where = ".".join(str(part) for part in issue["loc"])
        message = issue["msg"].removeprefix("Value error, ")
        quoted = f" (got {issue['input']!r})" if whole or not isinstance(issue["input"], dict) else ""
        lines.append(f"{where}: {message}{quoted}" if where else message)
    return lines


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 5e-6 as text; here it is a number, as in every other tool of the field. A key that comes twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} comes twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that :class:`_Loader` would read as a number."""


for _yaml in (_Loader, _Dumper):
    _yaml.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: its chain of base files comes back to itself")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1) if path.parent.is_dir() else []
        raise ConfigError(f"config file {path} does not exist" + (f"; did you mean {path.parent / near[0]}?" if near else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} must hold sections, not a {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"config file {path}: base must name one file, not {base!r}")
    return _merge(_read_yaml(path.parent / base, (*seen, path.resolve())), tree)


def _merge(base: dict, top: dict) -> dict:
    merged = dict(base)
    for key, value in top.items():
        merged[key] = _merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


def _section_of(annotation: Any) -> type[Section] | None:
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _unknown_keys(tree: Any, section: type[Section], at: str) -> typing.Iterator[str]:
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        field = section.model_fields.get(key)
        if field is None:
            near = difflib.get_close_matches(str(key), _all_keys(section), 1, 0.5)
            hint = f"did you mean {at}{near[0]}?" if near else f"known here: {', '.join(section.model_fields)}"
            elsewhere = [k for k in _all_keys(RunConfig) if k.endswith(f".{key}")]
            if elsewhere:
                hint = f"did you mean {elsewhere[0]}?"
            yield f"unknown key {at}{key}; {hint}"
            continue
        child = _section_of(field.annotation)
        if child is not None:
            for item in value if isinstance(value, list) else [value]:
                yield from _unknown_keys(item, child, f"{at}{key}.")


def _all_keys(section: type[Section], at: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(at + name)
        child = _section_of(field.annotation)
        if child is not None:
            keys += _all_keys(child, f"{at}{name}.")
    return keys


def describe() -> str:
    """The whole tree as text: key, type, default and meaning of every setting."""
    lines: list[str] = []

    def walk(section: type[Section], at: str) -> None:
        for name, field in section.model_fields.items():
            child = _section_of(field.annotation)
            if child is not None:
                lines.append(f"\n{at}{name}: {field.description}")
                walk(child, f"{at}{name}.")
                continue
            kind = str(field.annotation.__name__ if isinstance(field.annotation, type) else field.annotation)
            kind = kind.replace("typing.", "").replace("pathlib.", "").replace("Literal", "one of ")
            default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!s}"
            lines.append(f"  {at}{name}  ({kind}; {default})\n      {field.description}")

    walk(RunConfig, "")
    return "\n".join(lines).strip()


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML that :func:`load_config` reads back to an equal tree."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
