"""A run that is killed, or its disk full, at any of its file operations ends as if it were not.

Every operation of a short run on its folder is tried: before it, with what was being written half
there, and with a disk that takes no byte from there on.
"""

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit.crashes import (
    DONE,
    KILLED,
    REFUSED,
    contents,
    ended,
    forked,
    operations,
    points_of,
    state,
)
from kit.sd_files import micro_pipeline
from kit.short_run import config_of, train

from dmd_train.config import Config
from dmd_train.data import pairs
from dmd_train.run.export import export
from dmd_train.run.folder import RunFolder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and asks /proc")

TENTH = 10


@pytest.fixture(autouse=True)
def kept_without_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dead process wrote is the kernel's: flushing to the disk is against a power cut."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files of pairs."""
    monkeypatch.setattr(pairs, "shard_size", lambda shape: 4)


def fresh(config: Config) -> None:
    """Nothing is there yet."""


def stopped(config: Config) -> None:
    """A run stopped at its first step, between two checkpoints: a student of then is there."""
    assert forked(lambda: train(config, stop_after=1)) == DONE


def killed(config: Config) -> None:
    """A run killed in the middle, with half a picture, after its first checkpoint."""
    work, folder = lambda: train(config), config.output
    number = 0
    while len(list(folder.glob("checkpoints/step-*"))) < 1 or not list(folder.glob("samples/.*")):
        shutil.rmtree(folder, ignore_errors=True)
        number += 1
        assert ended(work, folder, number, "torn") == KILLED


STARTS = [fresh, stopped, killed]


@pytest.fixture
def uninterrupted(tmp_path: Path, small_shards: None) -> Path:
    config = config_of(tmp_path)
    assert forked(lambda: train(config)) == DONE
    return config.output.rename(tmp_path / "whole")


def tried(
    work: Callable[[], object],
    start: Path,
    folder: Path,
    share: int,
    and_then: Callable[[], object] = lambda: None,
) -> tuple[int, list[str], dict[str, Any]]:
    """How many crash points of `work`, one in `share`; those after which it goes wrong; contents.

    What was left as after another point is not gone on with once more.
    start: what lies in `folder` before. and_then: what follows when the work is done again.
    contents: what it leaves there where nothing cuts it off.
    """

    def begin() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if start.exists():
            shutil.copytree(start, folder)

    begin()
    done = operations(work, folder, folder.with_name("operations"))
    expected, bad = contents(folder), []
    points = points_of(done)
    points = random.Random(len(points)).sample(points, -(-len(points) // share))
    seen: set[object] = set()
    for number, ending in points:
        begin()
        code = ended(work, folder, number, ending)
        allowed = {DONE, REFUSED} if ending == "full" else {KILLED}
        said = f"{ending} at {number}, {done[number]}"
        if code not in allowed:
            bad.append(f"{said}: ended with {code}")
            continue
        if (left := state(folder)) in seen:
            continue
        seen.add(left)
        if forked(lambda: (work(), and_then())) != DONE:
            bad.append(f"{said}: did not go on")
        elif (found := contents(folder)) != expected:
            differ = {k for k in found.keys() | expected if found.get(k) != expected.get(k)}
            bad.append(f"{said}: {sorted(differ)} not as uninterrupted")
    return len(points), bad, expected


def runs(begin: Callable[[Config], None], tmp_path: Path, whole: Path, share: int) -> None:
    """Crash points of a run from one of STARTS to its end."""
    config, start = config_of(tmp_path), tmp_path / "start"
    begin(config)
    if config.output.exists():
        config.output.rename(start)
    count, bad, left = tried(lambda: train(config), start, config.output, share)
    print(f"{begin.__name__}: {count} crash points, {len(bad)} bad")
    assert not bad, "\n".join(bad)
    assert count > 50 / share
    assert left == contents(whole)


def test_a_run_cut_off_at_one_in_ten_of_its_file_operations_ends_as_if_it_were_not(
    tmp_path: Path, uninterrupted: Path
) -> None:
    runs(fresh, tmp_path, uninterrupted, TENTH)


@pytest.mark.long
@pytest.mark.parametrize("begin", STARTS)
def test_a_run_cut_off_at_any_of_its_file_operations_ends_as_if_it_were_not(
    begin: Callable[[Config], None], tmp_path: Path, uninterrupted: Path
) -> None:
    runs(begin, tmp_path, uninterrupted, 1)


@pytest.mark.long
def test_an_export_cut_off_at_any_of_its_file_operations_is_whole_or_as_before(
    tmp_path: Path,
) -> None:
    """Over an older export."""
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    teacher = micro_pipeline(tmp_path / "teacher", "sd1")
    told = {"preset": "sd15-one-step-lora", "prompts": str(tmp_path / "prompts.txt")}
    small = {"device": "cpu", "batch_size": 1, "regression_weight": 0.0}
    config = config_of(tmp_path, teacher=str(teacher), **told, **small)

    def work() -> None:
        export(config.output, "lora", "fp16")

    def and_then() -> None:
        """The temporary files of an export are swept when the run is next opened."""
        with RunFolder(config):
            pass

    assert forked(lambda: train(config)) == DONE
    assert forked(work) == DONE
    start = config.output.rename(tmp_path / "start")
    count, bad, left = tried(work, start, config.output, 1, and_then)
    print(f"export: {count} crash points, {len(bad)} bad")
    assert not bad, "\n".join(bad)
    assert count > 10
    assert left == contents(start)
