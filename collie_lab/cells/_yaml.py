"""The YAML that users write: nothing in it is lost or misread in silence; and what is written reads back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import yaml
from typing_extensions import override

from collie_lab.cells._base import CellError, Problem

__all__ = ["dump", "parse", "read"]

#: A float of YAML 1.2, which PyYAML, of YAML 1.1, takes for a text: `1e-3`.
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+\Z")


_MERGE: Final = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """A key that stands twice is an error: PyYAML takes the last one."""

    @override
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put what `<<` merges before a mapping's own keys, the first of several mappings last: a key's last counts.

        PyYAML 6.0.4 has the last of several mappings win, and drops keys that override merged ones.
        """
        merged: list[tuple[yaml.Node, yaml.Node]] = []
        pairs = node.value
        node.value = own = [pair for pair in pairs if pair[0].tag != _MERGE]  # a mapping may merge itself
        for key, value in pairs:
            if key.tag != _MERGE:
                continue
            sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for source in reversed(sources):
                if not isinstance(source, yaml.MappingNode):
                    raise yaml.constructor.ConstructorError(
                        "while constructing a mapping", node.start_mark,
                        f"expected a mapping or list of mappings for merging, but found {source.id}", source.start_mark)
                self.flatten_mapping(source)
                merged += source.value
        node.value = merged + own
        super().flatten_mapping(node)  # whatever else it does

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:  # not yet with what `<<` merges, which they may override
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                line = key.start_mark.line + 1
                if (key.tag, key.value) in lines:
                    raise yaml.YAMLError(f"the key `{key.value}` stands twice, in line {lines[key.tag, key.value]} and "
                                         f"in line {line}: keep one of them")
                lines[key.tag, key.value] = line
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes a text that reads as a float."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def dump(plain: Any) -> str:
    """Plain values as YAML, keys in their order."""
    return str(yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def parse(text: str, cell: str, field: str = "", of: str = "this") -> Any:
    """The plain values of a YAML text.

    Raises:
        CellError: no valid YAML; named after `cell` and `field`, about what it is `of`.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # a date that there is not, 2026-02-30, is a ValueError
        raise CellError([Problem(cell, field, f"{of} is no valid YAML: {error}")]) from None


def read(path: str | Path, cell: str) -> Any:
    """The plain values of a YAML file.

    Raises:
        CellError: it cannot be read, is no text in UTF-8, or no valid YAML.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise CellError([Problem(cell, "", f"{path}: {error.strerror}",
                                 f"paths are relative to {Path.cwd()}")]) from None
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise CellError([Problem(cell, "", f"{path} is no text in UTF-8: line {line} has other bytes",
                                 "save it as UTF-8")]) from None
    return parse(text, cell, of=str(path))
