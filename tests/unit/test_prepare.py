"""How a run becomes ready: what is told of it, and what ends it."""

from pathlib import Path

import pytest
import torch
from kit.command_line import WriteRun
from PIL import Image

from dmd_train.config import load_config
from dmd_train.data.conditions import Classes
from dmd_train.data.pairs import StoredPairs
from dmd_train.distil import distil
from dmd_train.networks.load import load_teacher
from dmd_train.plan import RandomPairs
from dmd_train.prepare import Doing, carried_out, prepare
from dmd_train.run.folder import RunFolder

CPU = torch.device("cpu")


class Stopped(Exception):
    """What a door raises where the user has pressed stop."""


def test_each_part_of_a_preparation_is_told_up_to_its_total(
    write_run: WriteRun, tmp_path: Path
) -> None:
    config, told = load_config(write_run(tmp_path), []), list[Doing]()
    with RunFolder(config) as run:
        carried_out(prepare(run, load_teacher(config, CPU)), told.append)
    assert list(dict.fromkeys(doing.what for doing in told)) == ["pairs", "teacher's pictures"]
    for what in ("pairs", "teacher's pictures"):
        assert [doing for doing in told if doing.what == what][-1].done == told_total(told, what)


def told_total(told: list[Doing], what: str) -> int:
    (total,) = {doing.total for doing in told if doing.what == what}
    return total


def test_what_is_made_before_a_stop_is_kept_and_the_run_can_be_prepared_again(
    write_run: WriteRun, tmp_path: Path
) -> None:
    config = load_config(write_run(tmp_path), [])

    def stop(doing: Doing) -> None:
        raise Stopped

    with RunFolder(config) as run:
        with pytest.raises(Stopped):
            carried_out(prepare(run, load_teacher(config, CPU)), stop)
        (made,) = run.pairs.glob("*.safetensors")
        when = made.stat().st_mtime_ns
        ready = carried_out(prepare(run, load_teacher(config, CPU)), lambda _: None)
    assert made.stat().st_mtime_ns == when
    assert ready.step == 0 and ready.pairs is not None


def test_given_pairs_are_used_and_none_are_made(write_run: WriteRun, tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path), [])
    loaded = load_teacher(config, CPU)
    pairs = RandomPairs(loaded.network.shape)
    with RunFolder(config) as run:
        ready = carried_out(prepare(run, loaded, pairs=pairs, pictures=False), lambda _: None)
        assert not run.pairs.exists()
    assert ready.pairs is pairs and ready.sheet is None


def test_given_conditions_are_those_that_the_run_learns_from(
    write_run: WriteRun, tmp_path: Path
) -> None:
    config, conditions = load_config(write_run(tmp_path), []), Classes(3)
    with RunFolder(config) as run:
        preparation = prepare(run, load_teacher(config, CPU), conditions=conditions)
        ready = carried_out(preparation, lambda _: None)
    assert ready.state.conditions is conditions
    assert isinstance(ready.pairs, StoredPairs)
    assert int(ready.pairs.take(torch.arange(20), CPU).row.max()) == 2


def test_pictures_are_drawn_by_the_moving_average_of_the_student(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_run(tmp_path, steps=3), [])
    with RunFolder(config) as run:
        ready = carried_out(prepare(run, load_teacher(config, CPU)), lambda _: None)
        weight = ready.state.student.parameters["enter.weight"]
        drawn: list[torch.Tensor] = []

        def draw(*_: object) -> Image.Image:
            drawn.append(weight.detach().clone())
            return Image.new("RGB", (1, 1))

        monkeypatch.setattr(ready.sheet, "draw", draw)
        for report in distil(ready):
            assert (report.picture is None) == (report.step == 2)
            if report.picture:
                assert torch.equal(drawn[-1], ready.state.ema.average["enter.weight"])
                assert not torch.equal(drawn[-1], weight)


def test_what_a_killed_run_logged_after_its_last_checkpoint_is_not_told_twice(
    write_run: WriteRun, tmp_path: Path
) -> None:
    config = load_config(write_run(tmp_path, steps=4, checkpoint_every=2), [])
    with RunFolder(config) as run:
        reports = distil(carried_out(prepare(run, load_teacher(config, CPU)), lambda _: None))
        for report in reports:
            if report.step == 2:
                reports.close()
        run.log([{"step": 3}])
        for _ in distil(carried_out(prepare(run, load_teacher(config, CPU)), lambda _: None)):
            pass
        assert [row["step"] for row in run.read_metrics()] == [1, 2, 3, 4]
        assert all("critic/denoising" in row for row in run.read_metrics())


def test_a_run_is_ready_where_its_newest_checkpoint_stands(
    write_run: WriteRun, tmp_path: Path
) -> None:
    config = load_config(write_run(tmp_path, steps=20, checkpoint_every=10), [])
    with RunFolder(config) as run:
        reports = distil(carried_out(prepare(run, load_teacher(config, CPU)), lambda _: None))
        for report in reports:
            if report.step == 12:
                reports.close()
        left = {key: value.clone() for key, value in run.newest().tensors.items()}  # type: ignore[union-attr]
        again = carried_out(prepare(run, load_teacher(config, CPU)), lambda _: None)
    assert again.step == 12
    now = again.state.tensors()
    assert left.keys() == now.keys()
    assert all(torch.equal(now[key], value) for key, value in left.items())
