"""Where runs and pairs of the canvas lie, and what they are called."""

import hashlib
from pathlib import Path

import folder_paths
import yaml

from ..dmd_train.config import Config, as_before
from ..dmd_train.errors import UserError
from ..dmd_train.files.names import is_name
from ..dmd_train.run.folder import FREE_TO_CHANGE
from .model_files import PACK

HEADLESS = "runs/"
"""How the names of runs begin that lie in the pack's own folder."""


def runs_folder() -> Path:
    """The runs of the canvas: they are output, which no update of the pack touches."""
    return Path(folder_paths.get_output_directory()) / "dmd_runs"


def run_path(name: str) -> Path:
    """The run of this name. Raises UserError for more than a folder's name."""
    return runs_folder() / _checked(name, "run")


def pairs_path(name: str) -> Path:
    """The pairs of this name. Raises UserError for more than a folder's name."""
    return Path(folder_paths.get_output_directory()) / "dmd_pairs" / _checked(name, "name")


def _checked(name: str, widget: str) -> str:
    if not is_name(name):
        raise UserError(
            f"{widget}: '{name}' is no name of a folder. Use letters, digits, spaces, . _ and -; "
            "200 at most, and no name that Windows keeps (CON, NUL, COM1)."
        )
    return name


def name_of(run: Path) -> str:
    """What a run is called among `run_folders`."""
    return run.name if run.parent == runs_folder() else f"{HEADLESS}{run.name}"


def run_folders() -> dict[str, Path]:
    """Every run there is, newest first: the canvas's by name, headless ones as runs/NAME."""
    found = {}
    for folder, prefix in ((runs_folder(), ""), (PACK / "runs", HEADLESS)):
        for run_yaml in folder.glob("*/run.yaml"):
            found[prefix + run_yaml.parent.name] = run_yaml.parent
    by_age = sorted(found, key=lambda name: (found[name] / "run.yaml").stat().st_mtime)
    return {name: found[name] for name in reversed(by_age)}


def run_name(config: Config, conditions_name: str) -> str:
    """A run's name where nobody gave one: the same for the same run, and for no other."""
    told = as_before(config)
    learned = {key: told[key] for key in told.keys() - FREE_TO_CHANGE - {"prompts"}}
    digest = hashlib.sha256(yaml.safe_dump([learned, conditions_name]).encode()).hexdigest()
    return f"{config.preset}-{digest[:8]}"
