"""Settings in YAML that anybody may have written: plain values, nothing that can be large.

Of YAML 1.1 left out: aliases and tags (a few bytes of them are gigabytes), dates, keys that occur
twice, more than one document.
"""

import re
from typing import Any

import yaml

from ..errors import UserError, shown

MOST = 1 << 20
"""Bytes of a file of settings."""

VALUES, DEPTH, DIGITS = 10_000, 20, 100
"""Most values of a text, levels of nesting, characters of a number."""

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that no setting has: control, and half a character."""

WAY_OUT = "Write one 'key: value' a line."


class Refused(yaml.YAMLError):
    """What is YAML, and no setting. problem_mark: where."""

    def __init__(self, problem: str, mark: yaml.Mark) -> None:
        self.problem, self.problem_mark = problem, mark


class PlainLoader(yaml.SafeLoader):
    """Null, true, false, numbers, strings; lists and mappings of these."""

    values = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Before a node is built. Raises Refused."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise Refused("aliases are not read here", mark)
        if event.tag:
            raise Refused("tags (!) are not read here", mark)
        self.values += 1
        if self.values > VALUES:
            raise Refused(f"holds more than {VALUES} values", mark)
        if self.depth == DEPTH:
            raise Refused(f"nested more than {DEPTH} deep", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node. Raises Refused for a number or a text that is none."""
        if isinstance(node, yaml.ScalarNode):
            is_text = node.tag == "tag:yaml.org,2002:str"
            if is_text and CONTROL.search(node.value):
                raise Refused("a text with control characters", node.start_mark)
            if not is_text and len(node.value) > DIGITS:
                raise Refused("a number of too many digits", node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError):  # 0x_ looks like a number
            raise Refused("not a number", node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping. Raises Refused for a key that is no word, or twice there."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise Refused("a key that is no word", key.start_mark)
            if key.value in seen:
                raise Refused(f"{shown(key.value)} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, source: str) -> Any:
    """The value of a text. Raises UserError, which begins with `source`."""
    if len(text) > MOST:
        raise UserError(f"{source}: larger than {MOST >> 20} MB. {WAY_OUT}")
    try:
        return yaml.load(text, PlainLoader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # "\UFFFFFFFF" is no character
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        why = f" ({error.problem})" if isinstance(error, Refused) else ""
        raise UserError(f"{source}: not valid YAML{line}{why}. {WAY_OUT}") from None


# a date is no setting's value; << and = are YAML's own
UNREAD = {"tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:merge", "tag:yaml.org,2002:value"}
PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in UNREAD]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
