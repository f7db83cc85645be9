"""locales/en/nodeDefs.json: the words of the nodes, as translators take them from here.

PYTHONPATH=tests python tests/kit/node_texts.py     write it anew, from the nodes
"""

from __future__ import annotations

import json
from typing import Any

from kit.comfy_host import PACK, Server

FILE = PACK / "locales/en/nodeDefs.json"
PREFIX = "DMD_"


def node_texts(object_info: dict[str, Any]) -> dict[str, Any]:
    """What /object_info says of our nodes, in the form that ComfyUI's page reads."""
    return {
        node_id: {
            "display_name": node["display_name"],
            "description": node["description"],
            "inputs": {
                name: {"name": name, "tooltip": options["tooltip"]}
                for kind in ("required", "optional")
                for name, (_, options) in node["input"].get(kind, {}).items()
            },
            "outputs": {
                str(i): {"name": name, "tooltip": tooltip}
                for i, (name, tooltip) in enumerate(
                    zip(node["output_name"], node["output_tooltips"], strict=True)
                )
            },
        }
        for node_id, node in sorted(object_info.items())
        if node_id.startswith(PREFIX)
    }


if __name__ == "__main__":
    with Server() as server:
        texts = node_texts(server.object_info())
    FILE.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n")
