"""report.html: what a run leaves for people to look at."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.short_run import config_of, train

from dmd_train.config import Config, make_config
from dmd_train.distil import Journal
from dmd_train.errors import UserError
from dmd_train.run import report
from dmd_train.run.folder import RunFolder
from dmd_train.run.report import PAGE, described, page, settings, write_report
from dmd_train.run.series import Series, thinned

ROW = '{"step": %d, "student/regression": %s, "seconds": 0.5}\n'


def data_in(file: Path) -> dict[str, Any]:
    """What the page is given to draw."""
    block = re.search(r'<script type="application/json" id="run">(.*?)</script>', file.read_text())
    assert block
    data: dict[str, Any] = json.loads(block[1])
    return data


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = config_of(tmp_path_factory.mktemp("report"))
    train(config)
    return config


def test_a_run_leaves_a_report_of_all_that_it_logged_and_drew(finished: Config) -> None:
    data = data_in(finished.output / "report.html")
    assert (data["step"], data["steps"], data["name"]) == (4, 4, "run")
    assert data["curves"]["steps"] == [1, 2, 3, 4]
    charts = {(line["chart"], line["label"]): line["values"] for line in data["curves"]["lines"]}
    assert {chart for chart, _ in charts} == {"losses", "gradient norms", "learning rate"}
    rows = RunFolder(finished).read_metrics()
    told = charts["losses", "student's regression on pairs"]
    assert told == pytest.approx([row["student/regression"] for row in rows], rel=1e-4)
    assert charts["learning rate", "of student and critic"] == pytest.approx(
        [finished.rate(step) for step in range(4)], rel=1e-4
    )
    assert [picture["step"] for picture in data["pictures"]] == [1, 3, 4]
    assert data["time"]["seconds"] == pytest.approx(sum(row["seconds"] for row in rows), rel=1e-4)
    assert "torch" in data["facts"]["versions"]


def test_a_run_stopped_at_its_second_step_leaves_a_report_of_two(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    train(config, stop_after=2)
    assert data_in(config.output / "report.html")["step"] == 2


def test_a_run_that_diverged_leaves_a_report_of_the_steps_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(journal: Journal) -> None:
        journal.run.log([{"step": 1, "critic/denoising": 2.0}])
        raise UserError("critic: denoising became nan")

    monkeypatch.setattr(Journal, "flush", refuse)
    config = config_of(tmp_path)
    with pytest.raises(UserError, match="became nan"):
        train(config)
    assert data_in(config.output / "report.html")["curves"]["steps"] == [1]


def test_no_text_of_a_run_is_read_as_html(finished: Config) -> None:
    hostile = "</script><img src=x onerror=alert(1)>"
    written = page({"name": hostile})
    assert "<img" not in written
    assert written.count("</script>") == 3
    for source in PAGE.glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", source.read_text()
        )


def test_the_page_asks_for_nothing_from_elsewhere(finished: Config) -> None:
    written = (finished.output / "report.html").read_text()
    assert not re.search(
        r"(src|href)=\"?http|@import|url\(|fetch\(|^import ", written, re.MULTILINE
    )


def test_each_setting_names_its_source_and_no_folder_of_this_machine(tmp_path: Path) -> None:
    told = {"teacher": "digits", "output": str(tmp_path / "here"), "steps": 7, "seed": 0}
    rows = {row["key"]: row for row in settings(make_config(told, "test"))}
    assert rows["output"]["value"] == "here"
    assert rows["steps"] == {
        "key": "steps",
        "value": "7",
        "source": "this run's own; the preset has 1500",
    }
    assert rows["critic_updates"]["source"] == "D2 4.2, ImageNet"
    assert rows["seed"]["source"] == "default"
    assert str(tmp_path) not in json.dumps(list(rows.values()))


def test_many_pictures_are_thinned_evenly_with_the_first_and_the_last_kept(
    finished: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    run = RunFolder(config)
    source = finished.output / "samples/step-00000001.png"
    run.samples.mkdir(parents=True)
    for step in range(1, 401):
        shutil.copy(source, run.samples / f"step-{step:08d}.png")
    data = data_in(write_report(run))
    shown = [picture["step"] for picture in data["pictures"]]
    assert (len(shown), shown[0], shown[-1], data["pictures_drawn"]) == (100, 1, 400, 400)
    assert set(np.diff(shown)) <= {4, 5}
    monkeypatch.setattr(report, "MOST_BYTES", 10 * source.stat().st_size)
    shown = [picture["step"] for picture in data_in(write_report(run))["pictures"]]
    assert (len(shown), shown[0], shown[-1]) == (10, 1, 400)


def test_the_thinned_curve_keeps_every_pixel_columns_least_and_greatest_value() -> None:
    steps = np.arange(1, 10_001)
    values = np.random.default_rng(0).normal(size=10_000)
    values[:5000] = np.nan
    few, kept = thinned(steps, {"x": values}, 100)
    assert len(few) == len(kept["x"]) == 200
    assert np.isnan(kept["x"][:100]).all()
    for column in range(50, 100):
        part = values[100 * column : 100 * (column + 1)]
        assert sorted(kept["x"][2 * column : 2 * column + 2]) == [part.min(), part.max()]
        assert list(few[2 * column : 2 * column + 2]) == [100 * column + 1, 100 * column + 100]


def test_a_growing_file_is_read_on_and_a_file_put_in_its_place_anew(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    series = Series(metrics)
    series.read()
    assert len(series.steps) == 0
    metrics.write_text(ROW % (1, 1.0) + "damaged\n" + ROW % (2, "NaN") + '{"step": 3, "stu')
    series.read()
    assert list(series.steps) == [1, 2]
    with metrics.open("a") as file:
        file.write('dent/regression": 3.0, "critic/denoising": 1.0}\n')
    series.read()
    assert list(series.steps) == [1, 2, 3]
    assert np.isnan(series.values["critic/denoising"][:2]).all()
    lines = described(tmp_path, config_of(tmp_path), series, 100)["curves"]["lines"]
    assert lines[0]["values"] == [1.0, None, 3.0]
    (tmp_path / "other").write_text(ROW % (1, 9.0))
    (tmp_path / "other").replace(metrics)
    series.read()
    assert list(series.steps) == [1]
    assert series.values["student/regression"][0] == 9.0


def test_a_number_that_is_none_is_null_in_json() -> None:
    assert [report._number(value) for value in (math.nan, math.inf, 0.1234567)] == [
        None,
        None,
        0.12346,
    ]
