"""A workflow of the page's as a file: which of its values is which widget's."""

import json
from typing import Any


def inputs_of(node: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name -> type (a list: a combo's choices) and options, of one entry of /object_info."""
    found = {}
    for kind in ("required", "optional"):
        for name, (type_, *options) in node["input"].get(kind, {}).items():
            about = options[0] if options else {}
            found[name] = (about["options"] if type_ == "COMBO" else type_, about)
    return found


def widgets_of(node: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    """Name, type and options of a node's widgets, in the order of `widgets_values`."""
    widgets: list[tuple[str, Any, dict[str, Any]]] = []
    for name, (type_, about) in inputs_of(node).items():
        if isinstance(type_, list) or type_ in ("INT", "FLOAT", "STRING", "BOOLEAN"):
            widgets.append((name, type_, about))
            if about.get("control_after_generate", name == "seed"):
                widgets.append((f"{name}, afterwards", ["fixed", "increment", "randomize"], {}))
    return widgets


def with_widgets(
    workflow: dict[str, Any], widgets: dict[str, dict[str, Any]], nodes: dict[str, Any]
) -> dict[str, Any]:
    """The workflow with other values. widgets: by node and name. nodes: /object_info."""
    workflow = json.loads(json.dumps(workflow))
    for node in workflow["nodes"]:
        values = widgets.get(node["type"], {})
        if values:
            names = [name for name, *_ in widgets_of(nodes[node["type"]])]
            for name, value in values.items():
                node["widgets_values"][names.index(name)] = value
    return workflow
