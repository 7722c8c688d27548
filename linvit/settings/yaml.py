"""Settings in YAML files: duplicate keys are errors, and 1e-3 is a number."""

import re
from pathlib import Path
from typing import Any

import yaml

from linvit.output.files import write_text

# Far more than settings have. A few lines of aliases of aliases stand for billions of values.
_MAX_NODES = 100_000


class _Loader(yaml.SafeLoader):
    def get_single_node(self) -> yaml.Node | None:
        try:
            node: yaml.Node | None = super().get_single_node()
            if node is not None:
                _count_nodes(node, {})
        except RecursionError:
            raise yaml.YAMLError("it is nested too deeply") from None
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                kind = "list" if isinstance(key, yaml.SequenceNode) else "dictionary"
                raise yaml.constructor.ConstructorError(None, None, f"a {kind} cannot be a name", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is set twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _count_nodes(node: yaml.Node, counts: dict[yaml.Node, int]) -> int:
    """The number of values that a node stands for, with its aliases spelt out; YAMLError if there are too many."""
    # A node that contains itself is found here while it is being counted.
    if counts.setdefault(node, 0):
        return counts[node]
    counts[node] = _MAX_NODES
    pairs = isinstance(node, yaml.MappingNode)
    inner = [part for pair in node.value for part in pair] if pairs else node.value
    count = 1 + (sum(_count_nodes(part, counts) for part in inner) if isinstance(inner, list) else 0)
    if count > _MAX_NODES:
        raise yaml.YAMLError(f"it stands for more than {_MAX_NODES:,} values, or contains itself")
    counts[node] = count
    return count


# PyYAML follows YAML 1.1, in which 1e-3 (without a dot) and -.5 are strings.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$|[-+]\.\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Parse YAML; raises yaml.YAMLError."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:
        # PyYAML raises Python's own error for a date with a 13th month, for example.
        raise yaml.YAMLError(str(error)) from None


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; an empty file has none.

    Raises ValueError, naming the file, if it cannot be read or has other content than `name: value` lines.
    """
    try:
        settings = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: file not found") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not a text file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}:" if mark else ""
        raise ValueError(f"{path}:{line} not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ValueError(f"{path}: the file must consist of `name: value` lines")
    return settings


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write `settings` as YAML in their order. Raises OSError on failure and then keeps the old file."""
    write_text(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
