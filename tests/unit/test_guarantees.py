"""What befalls a run between its start and its end, and what is left of it: docs/guarantees.md."""

import errno
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import runs
from kit.command_line import Command, refused
from kit.crashes import DONE, REFUSED, contents, forked
from kit.short_run import config_of, train
from torch import Tensor

from dmd_train.config import Config, dump_config, load_config
from dmd_train.data import pairs
from dmd_train.errors import UserError
from dmd_train.files import write
from dmd_train.files.write import sole_writer, write_atomically, write_text
from dmd_train.networks.load import load
from dmd_train.prepare import prepare
from dmd_train.run.folder import FREE_TO_CHANGE, RunFolder, exporting

GUARANTEES = Path(__file__).parents[2] / "docs/guarantees.md"
NOBODY = 65534
ROUNDING = 1e-4
"""Relative distance of weights whose sums were taken in another order, after four steps of Adam."""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped at the first of its four steps; not to be changed."""
    config = config_of(tmp_path_factory.mktemp("stopped"))
    train(config, stop_after=1)
    return config.output


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, never stopped; not to be changed."""
    config = config_of(tmp_path_factory.mktemp("whole"))
    train(config)
    return config.output


def same(run: Path, other: Path) -> bool:
    """Whether two folders hold the same, bit for bit, but for what names the folder itself."""
    one, two = ({**contents(run), "run.yaml": b"", "report.html": b""} for run in (run, other))
    return one == two


@pytest.fixture
def config(stopped: Path, tmp_path: Path) -> Config:
    """Of a stopped run of the test's own."""
    shutil.copytree(stopped, tmp_path / "run")
    return config_of(tmp_path)


def test_a_run_whose_folder_was_moved_goes_on_to_the_same_weights(
    config: Config, whole: Path, tmp_path: Path
) -> None:
    moved = config.output.rename(tmp_path / "moved")
    train(config.model_copy(update={"output": moved}))
    assert same(moved, whole)
    assert load_config(moved / "run.yaml", []).output == moved
    assert not config.output.exists()


def test_a_moved_run_is_not_begun_anew_where_it_was(
    config: Config, dmd: Command, tmp_path: Path
) -> None:
    moved = config.output.rename(tmp_path / "moved")
    way_out = f"--set output={moved}"
    for command in ("train", "pairs"):
        refused(dmd(command, moved / "run.yaml"), "Was it moved", way_out)
    assert not config.output.exists()
    assert dmd("pairs", moved / "run.yaml", *way_out.split()).code == 0
    assert dmd("pairs", moved / "run.yaml").code == 0


def test_a_run_goes_on_by_way_of_a_link_to_its_folder_and_of_links_in_it(
    config: Config, whole: Path, tmp_path: Path
) -> None:
    (config.output / "checkpoints").rename(tmp_path / "elsewhere")
    (config.output / "checkpoints").symlink_to(tmp_path / "elsewhere")
    link = tmp_path / "link"
    link.symlink_to(config.output)
    with RunFolder(config), pytest.raises(UserError, match="another run is using this folder"):
        train(config.model_copy(update={"output": link}))
    train(config.model_copy(update={"output": link}))
    assert link.is_symlink() and (config.output / "checkpoints").is_symlink()
    (config.output / "checkpoints").unlink()
    (tmp_path / "elsewhere").rename(config.output / "checkpoints")
    assert same(config.output, whole)


def table() -> dict[str, str]:
    """Of the settings that may change: what the guarantees promise of the weights then."""
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", GUARANTEES.read_text(), re.MULTILINE)
    return dict(rows)


def test_the_table_of_settings_that_may_change_is_the_codes() -> None:
    assert table().keys() == FREE_TO_CHANGE
    assert set(table().values()) == {"the same", "the same up to rounding"}


def ended_with(changed: Config) -> dict[str, Tensor]:
    """The state at the end of a run that goes on with other settings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(changed.cpu_threads or threads)
    try:
        train(changed)
    finally:
        torch.set_num_threads(threads)
    return runs.state(changed.output)


def test_settings_that_leave_the_weights_the_same_do_so_bit_for_bit(
    config: Config, whole: Path
) -> None:
    others = {"checkpoint_every": 1, "sample_every": 2, "trackers": ["tensorboard"]}
    assert {*others, "output"} == {k for k, weights in table().items() if weights == "the same"}
    assert runs.same(ended_with(config.model_copy(update=others)), runs.state(whole))


@pytest.mark.parametrize(("key", "value"), [("micro_batch_size", 1), ("cpu_threads", 2)])
def test_settings_that_may_round_otherwise_change_no_more(
    key: str, value: int, config: Config, whole: Path
) -> None:
    assert table()[key] == "the same up to rounding"
    state, other = ended_with(config.model_copy(update={key: value})), runs.state(whole)
    assert all(runs.apart(state, other, part) < ROUNDING for part in ("student", "critic", "ema"))


def another(key: str, value: Any) -> Any:
    """Another value of a setting, which is one as well."""
    match value:
        case bool():
            return not value
        case float():
            return value / 2 or 0.5
        case int():
            return value - 64 if value > 64 else value + 64
        case tuple():
            return tuple(another(key, part) for part in value)
        case _:
            paths = ["sd15-paper" if key == "preset" else "x"]
            choices = Config.model_json_schema()["properties"][key].get("enum", paths)
            return next(choice for choice in choices if choice != value)


@pytest.mark.parametrize("is_its_own", [True, False])
def test_every_other_setting_is_refused_by_its_name_in_the_runs_own_file_too(
    is_its_own: bool, config: Config
) -> None:
    run_yaml = config.output / "run.yaml"
    for key in Config.model_fields.keys() - FREE_TO_CHANGE:
        changed = config.model_copy(update={key: another(key, getattr(config, key))})
        write_text(run_yaml, dump_config(changed if is_its_own else config))
        before = run_yaml.read_bytes()
        said = rf"was begun with {key}: .*Set it back"
        with pytest.raises(UserError, match=said), RunFolder(changed):
            pass
        assert run_yaml.read_bytes() == before


def test_a_clock_set_back_changes_nothing(
    config: Config, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    past = 86400.0
    for file in config.output.rglob("*"):  # as by a clock that was a day ahead
        os.utime(file, (time.time() + past, time.time() + past))
    monkeypatch.setattr(time, "time", lambda: past)
    monkeypatch.setattr(time, "time_ns", lambda: int(past * 1e9))
    train(config)
    assert same(config.output, whole)
    assert all(row["seconds"] >= 0 for row in RunFolder(config).read_metrics())


def test_a_run_that_rests_keeps_its_folder_and_goes_on_to_the_same_weights(
    config: Config, whole: Path
) -> None:
    """SIGSTOP and SIGCONT, as by Ctrl-Z and fg."""

    def rest(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGSTOP)

    child = os.fork()
    if not child:
        code = 1
        try:
            train(config, at=rest)
            code = 0
        finally:
            os._exit(code)
    assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
    try:
        with pytest.raises(UserError, match="another run is using this folder"):
            train(config)
    finally:
        os.kill(child, signal.SIGCONT)
        assert os.waitpid(child, 0)[1] == 0
    assert same(config.output, whole)


def without_rights(work: Callable[[], object]) -> int:
    """How `work` ends in a fork that may write only what it is allowed to; root may anything."""

    def one_of_many() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        work()

    return forked(one_of_many)


@pytest.fixture
def of_nobody(config: Config) -> Iterator[Config]:
    """The stopped run where anybody may look."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        shutil.copytree(config.output, folder / "run")
        for path in (folder / "run").rglob("*"):
            path.chmod(0o777)
        (folder / "run").chmod(0o777)
        yield config_of(folder)


@pytest.mark.parametrize("inside", ["", "checkpoints", "samples"])
def test_a_run_whose_folder_may_not_be_written_to_is_refused_and_goes_on_when_it_may(
    inside: str, of_nobody: Config, whole: Path
) -> None:
    run = of_nobody.output
    before = contents(run)
    (run / inside).chmod(0o555)
    assert without_rights(lambda: train(of_nobody)) == REFUSED
    assert inside or contents(run) == before
    (run / inside).chmod(0o777)
    assert without_rights(lambda: train(of_nobody)) == DONE
    assert same(run, whole)


def test_a_quota_that_is_used_up_is_named_and_the_run_goes_on_when_there_is_room(
    config: Config, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network drive tells it only when a file is flushed."""

    def refuses(path: Path) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as full:
        full.setattr(write, "flush_file", refuses)
        with pytest.raises(UserError, match=r"quota exceeded.*Make room"):
            train(config)
    train(config)
    assert same(config.output, whole)


def test_a_folder_that_is_taken_away_while_pairs_are_made_is_named_and_not_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "shard_size", lambda shape: 4)
    config = config_of(tmp_path)
    with (
        pytest.raises(UserError, match=f"{config.output}/pairs: was deleted or moved"),
        RunFolder(config) as run,
    ):
        for doing in prepare(run, load("digits", torch.device("cpu"))):
            if doing.what == "pairs":
                assert doing.done == 4
                config.output.rename(tmp_path / "moved")
    assert not config.output.exists()


def test_a_folder_that_is_taken_away_while_a_file_is_written_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=f"{folder}: was deleted or moved"):
        write_atomically(folder / "x.txt", lambda _: shutil.rmtree(folder))


def test_what_a_kill_left_in_a_folder_is_swept_by_its_next_writer_alone(tmp_path: Path) -> None:
    half = tmp_path / "pairs/.shard-00000-0123456789abcdef.safetensors"
    write_text(half, "")
    with sole_writer(half.parent):
        assert not half.exists()
        half.write_text("")
        with pytest.raises(UserError, match="another process writes"), sole_writer(half.parent):
            pass
        assert half.exists()


def test_a_finished_run_that_was_killed_before_its_curves_gets_them_when_it_is_opened(
    whole: Path, dmd: Command, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for rows in ((run / "metrics.jsonl").read_text(), ""):  # none: somebody deleted them
        (run / "metrics.jsonl").write_text(rows)
        (run / "curves.png").unlink(missing_ok=True)
        assert dmd("train", run / "run.yaml", "--set", f"output={run}").code == 0
        assert (run / "curves.png").exists() == bool(rows)


def test_a_file_that_is_being_exported_is_not_swept_and_one_that_a_kill_left_is(
    config: Config,
) -> None:
    half = config.output / ".student-lora-0123456789abcdef.safetensors"
    half.write_text("")
    with exporting(config.output), RunFolder(config):
        assert half.exists()
    with RunFolder(config):
        assert not half.exists()
