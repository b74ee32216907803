"""YAML as people write it, and ``key.path=value`` overrides of what a file says.

Stricter than YAML 1.1 where that would silently mean something else: a key stands once in a section and is text; 12:30
and 017 are text, not 750 and 15; dates are text. And 1e-4 is a number, which YAML 1.1 reads as text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from esi_ds.errors import UserError
from esi_ds.reading import read_text, reading

MAX_BYTES = 1 << 20  # of a config file
MAX_NODES = 100_000  # of a config with its aliases written out: few aliases of aliases make billions
STRING, MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}
FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)|[0-9][0-9_]*\.[0-9_]*|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
INTEGER = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$")
SETS = ("eval.prompts", "eval.benign")  # lists of sections, of which a single one may stand without the list
FLOW = ("[", "{", '"', "'")  # the first characters of an override's value that is read as YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML whose mappings hold each key once."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag not in (STRING, MERGE):
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a section or list"
                raise ValueError(f"the key {shown} in line {line} is not text: write it in quotation marks")
            if key.value in lines:
                raise ValueError(f"the key {key.value} in line {line} is already in line {lines[key.value]}")
            lines[key.value] = line
        return node


class _Dumper(yaml.SafeDumper):
    """Writes what ``_Loader`` reads back as the same values."""

    yaml_implicit_resolvers = {key: list(rules) for key, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()}


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """The text; in quotation marks where it holds a line break other than a line feed, which YAML would read as one."""
    style = '"' if re.search("[\r\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar(STRING, text, style=style)


_Dumper.add_representer(str, _represent_text)
for _first, _rules in yaml.SafeLoader.yaml_implicit_resolvers.items():
    _Loader.yaml_implicit_resolvers[_first] = [
        rule for rule in _rules if rule[0].rpartition(":")[2] in ("bool", "null", "merge")
    ]
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def parse_yaml(text: str) -> Any:
    """The content of a YAML text. Raises ValueError (with the line), RecursionError or OverflowError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MAX_NODES:
            raise ValueError(f"its aliases stand for more than {MAX_NODES:,} values")
        return loader.construct_document(node)
    except yaml.scanner.ScannerError as error:
        if "'\\t'" in str(error.problem) and error.problem_mark is not None:
            raise ValueError(f"line {error.problem_mark.line + 1} has a tab: indent with spaces") from error
        raise ValueError(" ".join(str(error).split())) from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    finally:
        loader.dispose()


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values below a node, aliases written out. sizes: of the nodes seen, by id; 0 while a node is being counted."""
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise ValueError(f"the alias in line {node.start_mark.line + 1} holds itself")
        return sizes[id(node)]
    if node.tag not in TAGS:
        raise ValueError(f"the value in line {node.start_mark.line + 1} has a tag, {node.tag}")
    sizes[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    sizes[id(node)] = 1 + sum(_size(child, sizes) for child in children)
    return sizes[id(node)]


def dump_yaml(content: Any) -> str:
    """YAML that ``parse_yaml`` reads back as ``content``."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path, field: str, remedy: str) -> Any:
    """The content of a YAML file. Raises UserError naming ``field`` and the file."""
    with reading(field, path, remedy, "is not a config"):
        return parse_yaml(read_text(path, MAX_BYTES))


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set the value of ``key.path=value`` in ``raw``; missing sections are created, missing list items are not.

    Raises UserError.
    """
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError("override", override, "is not key.path=value", "write for instance select.ratio=0.05")
    with reading(key, text, "quote it", "is not a YAML value"):
        value = parse_value(text)
    section: Any = raw
    for number, part in enumerate(parts[:-1], 1):
        index = _index(section, part, key, value)
        if isinstance(section, dict) and section.get(part) is None:
            section[part] = {}
        if ".".join(parts[:number]) in SETS and parts[number].isdecimal() and isinstance(section[index], dict):
            section[index] = [section[index]]
        section = section[index]
    section[_index(section, parts[-1], key, value)] = value


def parse_value(text: str) -> Any:
    """The value of an override: YAML in brackets, braces or quotation marks; else one plain scalar, whatever it holds.

    In YAML a plain ``a #b`` would end at the #, and ``a: b`` be a section. Raises ValueError or RecursionError.
    """
    text = text.strip()
    if text.startswith(FLOW):
        _refuse_comments(text)
        return parse_yaml(text)
    loader = _Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag if tag != MERGE else STRING, text))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    finally:
        loader.dispose()


def _refuse_comments(text: str) -> None:
    """Raise ValueError where YAML would drop a part of the text: between two tokens it only drops comments."""
    end = 0
    try:
        for token in yaml.scan(text, Loader=_Loader):
            if text[end : token.start_mark.index].strip():
                raise ValueError(f"everything from column {end + 1} on is a comment, which would be lost")
            end = max(end, token.end_mark.index)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _index(section: Any, part: str, key: str, value: Any) -> str | int:
    """How ``part`` of the key indexes a section or a list. value: of the whole key."""
    if isinstance(section, list):
        if not part.isdecimal() or int(part) >= len(section):
            raise UserError(key, value, f"{part} is not a position in the list before it", "count from 0")
        return int(part)
    if not isinstance(section, dict):
        raise UserError(key, value, f"the key before {part} is not a section", "give a key.path of the config")
    return part
