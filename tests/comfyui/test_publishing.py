"""What a registry and other people's tools hold a node pack against, on the files that are shipped.

All three work offline.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kit.comfy_host import PACK, PACK_NAME, comfyui_tree

SHIPPED = (
    *("__init__.py", "nodes", "dmd_train", "js", "workflows", "locales", "students"),
    *("pyproject.toml", "requirements.txt", "README.md", "LICENSE"),
)
BIN = Path(sys.executable).parent


def run(folder: Path, home: Path, *command: str | Path, fails: bool = False) -> str:
    """What the command prints in that folder; nothing of the user's own settings reaches it."""
    environment = os.environ | {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )
    assert bool(done.returncode) == fails, done.stdout
    return done.stdout


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """The files of the pack that a user gets, in a folder of their own."""
    git = ["git", "-C", PACK, "ls-files", "--cached", "--others", "--exclude-standard", "--"]
    names = run(PACK, tmp_path, *git, *SHIPPED).splitlines()
    target = tmp_path / PACK_NAME
    for name in names:
        if (PACK / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PACK / name, target / name)
    return target


def validated(folder: Path, home: Path) -> str:
    return run(
        folder, home, BIN / "comfy", "--skip-prompt", "--no-enable-telemetry", "node", "validate"
    )


def test_comfy_node_validate_finds_nothing(shipped: Path, tmp_path: Path) -> None:
    said = validated(shipped, tmp_path)
    assert "All validation checks passed" in said
    assert "warning" not in said.lower()
    (shipped / "nodes/bad.py").write_text('eval("1")\n')
    assert "warning" in validated(shipped, tmp_path).lower()


def test_comfy_test_lint_finds_nothing_even_when_strict(shipped: Path, tmp_path: Path) -> None:
    command = (BIN / "comfy-test", "lint", shipped, "--strict")
    said = run(tmp_path, tmp_path, *command)
    assert "[SYNTAX] PASSED" in said
    assert "[JAVASCRIPT] PASSED" in said
    (shipped / "nodes/bad.py").write_text("torch.nn.Linear(1, 1)\n")
    assert "nn.Linear()" in run(tmp_path, tmp_path, *command, fails=True)


def test_every_symbol_of_comfyui_that_the_nodes_use_exists_with_that_signature(
    shipped: Path, tmp_path: Path
) -> None:
    """comfy-import-guard wants ComfyUI as a git clone, and the pack in an installation."""
    clone, installed = tmp_path / "cache/ComfyUI", tmp_path / "installed"
    for source in comfyui_tree().rglob("*.py"):
        copied = clone / source.relative_to(comfyui_tree())
        if "custom_nodes" not in copied.parts:
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copied)
    git = ("git", "-c", "user.email=x@example.com", "-c", "user.name=x")
    for step in (("init", "-q"), ("add", "-A", "-f"), ("commit", "-q", "-m", "x")):
        run(clone, tmp_path, *git, *step)
    (installed / "custom_nodes").mkdir(parents=True)
    shutil.copytree(shipped, installed / "custom_nodes" / PACK_NAME)
    command = (
        *(BIN / "comfy-import-guard", "--offline", "--cache-dir", tmp_path / "cache", "check"),
        *("--comfy-dir", installed, "--target", "HEAD", "--no-update", "--strict"),
    )
    assert "1 safe" in run(tmp_path, tmp_path, *command)
    bad = installed / "custom_nodes" / PACK_NAME / "nodes/bad.py"
    bad.write_text("import comfy.sample\ncomfy.sample.no_such_function()\n")
    assert "WILL BREAK" in run(tmp_path, tmp_path, *command, fails=True)


def test_pyproject_says_what_a_registry_asks_for() -> None:
    (comfy,) = re.findall(r"^\[tool\.comfy\]\n(.*?)(?=^\[|\Z)", _pyproject(), re.M | re.S)
    for key in ("PublisherId", "DisplayName"):
        assert re.search(rf'^{key} = ".+"$', comfy, re.M), key
    assert not re.search("^web", comfy, re.M)  # __init__.py says it


def _pyproject() -> str:
    return (PACK / "pyproject.toml").read_text()
