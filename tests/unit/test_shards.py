"""Rows on disk in many files: the same however they are read, made, or made again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kit.command_line import Command, WriteRun
from kit.tiny import InMemory
from safetensors.torch import save_file
from torch import Tensor

from dmd_train.config import load_config
from dmd_train.data.pairs import StoredPairs, shard_size
from dmd_train.errors import UserError
from dmd_train.files import shards
from dmd_train.files.shards import ORIGIN_KEY, Shards, make_shards
from dmd_train.networks.load import load, save

CPU = torch.device("cpu")
TOTAL, SIZE = 23, 5
ROWS = torch.tensor([22, 0, 4, 5, 5, 19, 20, 9, 14, 15, 0])
"""The first and last of a file, the first and last of all, one row twice, out of order."""


def rows_of(numbers: range) -> dict[str, Tensor]:
    """Row i is told by its values."""
    number = torch.tensor(list(numbers))
    return {"number": number, "value": (number.view(-1, 1, 1) + torch.zeros(1, 2, 3)).half()}


def made(folder: Path, **process: int) -> list[int]:
    return list(make_shards(folder, TOTAL, SIZE, "this teacher", rows_of, **process))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Makers:
    """rows_of; notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[range] = []

    def __call__(self, numbers: range) -> dict[str, Tensor]:
        self.asked.append(numbers)
        return rows_of(numbers)


@pytest.mark.parametrize("in_memory", [1 << 30, 0], ids=["in memory", "mapped"])
def test_rows_are_those_that_were_made_whether_held_in_memory_or_mapped(
    in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made(tmp_path) == [5, 10, 15, 20, 23]
    monkeypatch.setattr(shards, "IN_MEMORY", in_memory)
    read = Shards(tmp_path)
    assert len(read.parts) == (1 if in_memory else 5)
    assert len(read) == TOTAL
    everything = rows_of(range(TOTAL))
    for key, value in everything.items():
        assert torch.equal(read.column(key), value)
        for rows in (ROWS, torch.arange(TOTAL), torch.tensor([7])):
            taken = read.take(rows)
            assert taken.keys() == everything.keys()
            assert taken[key].dtype == value.dtype
            assert torch.equal(taken[key], value[rows])


def test_rows_of_one_file_too_large_for_memory_are_those_that_were_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(make_shards(tmp_path, TOTAL, TOTAL, "this teacher", rows_of))
    monkeypatch.setattr(shards, "IN_MEMORY", 0)
    assert torch.equal(Shards(tmp_path).take(ROWS)["number"], ROWS)


def test_a_folder_without_shards_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no shards") as caught:
        Shards(tmp_path / "none")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recorded", ["another teacher", None])
def test_shards_of_another_origin_are_refused_in_one_line_and_left_as_they_are(
    recorded: str | None, tmp_path: Path
) -> None:
    metadata = {ORIGIN_KEY: recorded} if recorded else None
    save_file(rows_of(range(SIZE)), tmp_path / "shard-00000.safetensors", metadata)
    before, maker = contents(tmp_path), Makers()
    with pytest.raises(UserError) as caught:
        list(make_shards(tmp_path, TOTAL, SIZE, "this teacher", maker))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/shard-00000.safetensors: made by another teacher")
    assert f"Delete {tmp_path}" in message
    assert "\n" not in message
    assert maker.asked == []
    assert contents(tmp_path) == before


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def too_few(file: Path) -> None:
    """Whole, but made when fewer rows were wanted."""
    save_file(rows_of(range(5, 8)), file, {ORIGIN_KEY: "this teacher"})


@pytest.mark.parametrize("damage", [cut, empty, too_few, Path.unlink])
def test_a_damaged_shard_is_made_again_and_whole_ones_are_not_touched(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    made(tmp_path)
    before = contents(tmp_path)
    when = {file: file.stat() for file in tmp_path.iterdir()}
    file = tmp_path / "shard-00001.safetensors"
    damage(file)
    maker = Makers()
    counts = list(make_shards(tmp_path, TOTAL, SIZE, "this teacher", maker))
    assert counts == [5, 10, 15, 20, 23]
    assert maker.asked == [range(5, 10)]
    assert contents(tmp_path) == before
    for other in when.keys() - {file}:
        assert other.stat().st_mtime_ns == when[other].st_mtime_ns
        assert other.stat().st_ino == when[other].st_ino


def test_what_was_made_before_a_stop_is_not_made_again(tmp_path: Path) -> None:
    first, second = Makers(), Makers()
    stopped = make_shards(tmp_path, TOTAL, SIZE, "this teacher", first)
    assert [next(stopped), next(stopped)] == [5, 10]
    stopped.close()
    list(make_shards(tmp_path, TOTAL, SIZE, "this teacher", second))
    assert first.asked + second.asked == [range(i, min(i + 5, 23)) for i in range(0, 23, 5)]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_parts_of_several_processes_together_are_what_one_makes(
    count: int, tmp_path: Path
) -> None:
    (tmp_path / "all").mkdir()
    made(tmp_path / "one")
    for rank in range(count):
        before = contents(tmp_path / "all")
        made(tmp_path / "all", rank=rank, count=count)
        added = contents(tmp_path / "all").keys() - before.keys()
        assert added == {f"shard-{i:05d}.safetensors" for i in range(rank, 5, count)}
    assert contents(tmp_path / "all") == contents(tmp_path / "one")


def test_a_seed_that_occurs_twice_in_the_pairs_counts_once_as_its_first() -> None:
    value = torch.arange(6.0).view(6, 1, 1, 1)
    rows = torch.tensor([0, 1, 2, 0, 1, 2])
    twice = torch.tensor([7, 8, 7, 9, 8, 7])
    pairs = StoredPairs(InMemory(seed=twice, row=rows, noise=value, image=-value))
    assert len(pairs) == 3
    batch = pairs.take(torch.arange(3), CPU)
    assert batch.noise.flatten().tolist() == [0, 1, 3]
    assert batch.image.flatten().tolist() == [0, -1, -3]
    assert batch.row.tolist() == [0, 1, 0]
    drawn = pairs.take(pairs.draw(3000, torch.Generator().manual_seed(0)), CPU)
    counts = drawn.noise.flatten().long().bincount()
    assert counts.nonzero().flatten().tolist() == [0, 1, 3]
    assert counts[counts > 0].min() > 850  # of 1000; six standard deviations


@pytest.mark.parametrize(
    ("shape", "pairs"),
    [((1, 8, 8), 500), ((4, 64, 64), 16), ((4, 128, 128), 4), ((3, 512, 512), 4)],
)
def test_a_shard_of_pairs_is_small_enough_to_lose(shape: tuple[int, int, int], pairs: int) -> None:
    assert shard_size(shape) == pairs


def test_a_run_makes_a_cut_shard_of_its_pairs_again_and_goes_on(
    tmp_path: Path, dmd: Command, write_run: WriteRun
) -> None:
    run_yaml, folder = write_run(tmp_path, pairs=600, steps=20), tmp_path / "run/pairs"
    assert dmd("pairs", run_yaml).code == 0
    before = contents(folder)
    when = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    assert len(before) == 2
    cut(folder / "shard-00001.safetensors")
    outcome = dmd("train", run_yaml)
    assert outcome.code == 0, outcome.err
    assert contents(folder) == before
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == when
    assert (tmp_path / "run/student.safetensors").exists()


def test_pairs_of_a_run_whose_teacher_was_replaced_are_refused(
    tmp_path: Path, dmd: Command, write_run: WriteRun
) -> None:
    """Another file under the same name: run.yaml alone does not tell."""
    teacher = tmp_path / "teacher.safetensors"
    run_yaml = write_run(tmp_path, teacher=str(teacher), pairs=4)
    assert load_config(run_yaml, []).teacher == str(teacher)
    digits = load("digits", CPU).network
    save(teacher, digits)
    assert dmd("pairs", run_yaml).code == 0
    with torch.no_grad():
        next(digits.module.parameters()).add_(1)
    save(teacher, digits)
    outcome = dmd("train", run_yaml)
    assert outcome.code == 2
    assert "made by another teacher" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
