"""Before any pack is imported: the training extras are gone, and imports of packs are watched.

What a pack's code does to the network, to other processes or to the GPU is written to
output/witnessed.txt, a line "pack event" each.
"""

import re
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from folder_paths import get_output_directory

EXTRAS = {
    *("peft", "accelerate", "diffusers", "sklearn", "matplotlib", "torchmetrics"),
    *("typer", "rich"),
}
EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen"}
CUDA = ("is_available", "_lazy_init", "device_count", "mem_get_info", "get_device_properties")
WITNESSED = Path(get_output_directory(), "witnessed.txt")


class WithoutExtras:
    """The finder of installed modules, to which the extras are not installed."""

    find_distributions = PathFinder.find_distributions
    invalidate_caches = PathFinder.invalidate_caches

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        hidden = name.partition(".")[0] in EXTRAS
        return None if hidden else PathFinder.find_spec(name, path, target)


def witness(event: str) -> None:
    frame = sys._getframe(1)
    while frame := frame.f_back:  # type: ignore[assignment]
        if pack := re.search(r"/custom_nodes/([^/]+)/", frame.f_code.co_filename):
            with WITNESSED.open("a") as file:
                file.write(f"{pack[1]} {event}\n")
            return


def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        witness(f"torch.cuda.{name}")
        return function(*arguments, **keywords)

    return call


loaded = EXTRAS & sys.modules.keys()
assert not loaded, f"{loaded} imported before they could be hidden"
sys.meta_path[:] = [
    WithoutExtras if finder is PathFinder else finder
    for finder in sys.meta_path  # type: ignore
]
sys.addaudithook(lambda event, _: witness(event) if event in EVENTS else None)
for name in CUDA:
    setattr(torch.cuda, name, watched(name, getattr(torch.cuda, name)))
