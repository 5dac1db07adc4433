"""The YAML that users write: nothing in it is lost or misread in silence; and what is written reads back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import yaml

from collie_lab.cells._base import CellError, Problem

__all__ = ["dump", "parse", "read"]

#: A float of YAML 1.2, which PyYAML, of YAML 1.1, takes for a text: `1e-3`.
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+\Z")


class _Loader(yaml.SafeLoader):
    """A key that stands twice is an error: PyYAML takes the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:  # not yet with what `<<` merges, which they may override
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
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
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise CellError([Problem(cell, "", f"{path}: {error.strerror}",
                                 f"paths are relative to {Path.cwd()}")]) from None
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise CellError([Problem(cell, "", f"{path} is no text in UTF-8: line {line} has other bytes",
                                 "save it as UTF-8")]) from None
    return parse(text, cell, of=str(path))
