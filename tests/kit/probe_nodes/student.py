"""Students without a distillation: a file in input/ on the MODEL that it would have come from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


class Student:
    """What DMD Distill hands on, of input/NAME.safetensors."""

    CATEGORY = "probe"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL",), "name": ("STRING", {"default": "student"})},
        }

    def make(self, model: Any, name: str) -> tuple[Any]:
        from folder_paths import get_input_directory

        file = Path(get_input_directory(), f"{Path(name).name}.safetensors")
        # the pack is imported under the path of its folder
        (key,) = (key for key in sys.modules if key.endswith(".nodes.student_model"))
        return (sys.modules[key].student_model(model, file),)


class ShowText:
    """An end for a prompt that makes a text; shows it."""

    CATEGORY = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "tell"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"text": ("STRING", {"forceInput": True})}}

    def tell(self, text: str) -> dict[str, Any]:
        return {"ui": {"text": [text]}}
