"""ComfyUI's door. Importable without ComfyUI: the nodes are imported when it asks for them."""

from typing import Any

WEB_DIRECTORY = "./js"


async def comfy_entrypoint() -> Any:
    """The pack as a comfy_api ComfyExtension."""
    from .nodes import DMDOneStep

    return DMDOneStep()
