"""The README's commands are run, short, as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dmd_train import __version__

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
SHORTER = "--set steps=20 --set pairs=50 --set pair_steps=2 --set pair_batch_size=4"


def short(block: str) -> str:
    """The block with this interpreter for .venv's and a few steps for many."""
    block = block.replace(".venv/bin/python", sys.executable)
    block = block.replace("make demo", f"{sys.executable} -m dmd_train demo {SHORTER}")
    block = re.sub(r"(dmd_train train \S+)", rf"\1 {SHORTER}", block)
    return re.sub(r"(teacher digits)", r"\1 --steps 3", block)


@pytest.mark.long
def test_the_commands_of_the_readme_run_in_their_order(tmp_path: Path) -> None:
    ran = [block for block in BLOCKS if "dmd_train" in block or "make demo" in block]
    assert len(ran) >= 5
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    for block in ran:
        done = subprocess.run(
            ["bash", "-ec", short(block)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    for made in ("seven.png", "runs/demo/summary.json", "runs/demo/contact-sheet.png", "run.yaml"):
        assert (tmp_path / made).exists(), made


def test_what_the_files_say_of_themselves_is_the_version_of_the_package_and_of_the_changelog() -> (
    None
):
    package = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    newest = re.search(r"^## \[(\d.*)\]$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert package and newest
    assert package[1] == newest[1] == __version__


def test_every_requirement_begins_at_a_version_which_make_lowest_installs() -> None:
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert re.fullmatch(r"[a-z-]+>=[\d.]+", line), line


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_make_targets_set_up_the_venv_first(target: str, tmp_path: Path) -> None:
    """A fresh clone's make would create .venv and install before it runs anything."""
    subprocess.run(["git", "clone", "-q", ROOT, tmp_path / "clone"], check=True)
    done = subprocess.run(
        ["make", "-n", target], cwd=tmp_path / "clone", capture_output=True, text=True, check=True
    )
    venv = done.stdout.index("-m venv .venv")
    install = done.stdout.index("-c constraints.txt -r requirements.txt")
    job = done.stdout.index({"demo": "dmd_train demo", "test": "-m pytest"}[target])
    assert venv < install < job
