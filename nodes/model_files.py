"""The files that the load nodes offer, as "folder/name", and the paths behind them."""

from pathlib import Path

import folder_paths

from ..dmd_train.errors import UserError

PACK = Path(__file__).resolve().parents[1]
STUDENTS = "dmd_students"
FOLDERS = ("checkpoints", "diffusion_models", STUDENTS)


def register_students() -> None:
    """This pack's own files: the student and the teacher it ships, the students of its runs."""
    for folder in (PACK / "students", PACK / "dmd_train" / "networks", PACK / "runs"):
        folder_paths.add_model_folder_path(STUDENTS, str(folder))
    paths, _ = folder_paths.folder_names_and_paths[STUDENTS]
    folder_paths.folder_names_and_paths[STUDENTS] = (paths, {".safetensors"})


def choices() -> list[str]:
    """All files of the three folders; of a run, only its student."""
    return [
        f"{folder}/{name}"
        for folder in FOLDERS
        for name in folder_paths.get_filename_list(folder)
        if folder != STUDENTS or "/" not in name or Path(name).name == "student.safetensors"
    ]


def path_of(choice: str) -> Path:
    """The file of a choice. Raises UserError for one that is not (or no longer) offered."""
    folder, _, name = str(choice).partition("/")
    return file_of(folder if folder in FOLDERS else "", name, choice)


def file_of(folder: str, name: str, choice: str) -> Path:
    """A file of one of ComfyUI's folders. Raises UserError for one that is not there.

    choice: what the user chose. Older ComfyUIs do not look into a list: it may be anything.
    """
    path = folder_paths.get_full_path(folder, str(name))
    if path is None:
        raise UserError(f"{choice}: no such file. Press R to read the folders again.")
    return Path(path)
