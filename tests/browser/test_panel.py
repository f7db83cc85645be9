"""The panel of a run: on the nodes that train, and as report.html."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kit.comfy_host import PACK, Server
from kit.comfy_page import ARTEFACTS, ComfyPage
from kit.short_run import config_of, train
from playwright.sync_api import Browser

from dmd_train.files.write import write_text
from dmd_train.run.folder import RunFolder
from dmd_train.run.report import write_report

WORKFLOW = json.loads((PACK / "workflows/distil-digits.json").read_text())
NEEDED = ("DMD_LoadCheckpoint", "DMD_ClassLabel", "DMD_Distill")
STEPS = 20
QUICK = "pairs: 64\npair_batch_size: 16\npair_steps: 2\ncritic_updates: 1\nsample_every: 10"


def workflow(id: str) -> dict[str, Any]:
    """A short run of the digits, without what follows it; id: of the workflow."""
    nodes = [node for node in WORKFLOW["nodes"] if node["type"] in NEEDED]
    kept = {node["id"] for node in nodes}
    links = [link for link in WORKFLOW["links"] if {link[1], link[3]} <= kept]
    return WORKFLOW | {"id": id, "nodes": nodes, "links": links, "groups": []}


def open_short_run(page: ComfyPage, id: str, run: str = "") -> None:
    page.load(workflow(id))
    page.set_widgets("DMD_Distill", steps=STEPS, advanced=QUICK, run=run)
    page.look_at("DMD_Distill")


def test_the_panel_of_a_run_is_there_again_after_a_reload_and_a_cached_run_and_on_no_other_node(
    page: ComfyPage,
) -> None:
    first, second = (f"{i}0000000-0000-4000-8000-00000000000{i}" for i in (1, 2))
    open_short_run(page, first)
    planned = page.page.locator(".dmd-panel").get_by_role("row")
    planned.filter(has_text="learning_rate").filter(has_text="0.004").wait_for()
    planned.filter(has_text="steps").filter(has_text="the preset has 1500").wait_for()
    page.set_widgets("DMD_Distill", steps=0)
    planned.filter(has_text="steps").filter(has_text="two minutes on a CPU").wait_for()
    page.screenshot("panel-next-run")
    page.set_widgets("DMD_Distill", advanced="t_min: 2000")
    page.page.locator(".dmd-panel").get_by_text("t_min: input should be less than 1000").wait_for()
    page.set_widgets("DMD_Distill", steps=STEPS, advanced=QUICK)
    page.queue()
    panel, said = page.page.locator(".dmd-panel"), page.page.locator(".dmd-summary")
    end = said.filter(has_text=f"step {STEPS} of {STEPS}: 1 step")
    end.wait_for()
    line = end.inner_text()
    panel.get_by_text(f"step {STEPS} (picture 3 of 3)").wait_for()
    assert panel.locator("img").evaluate("img => img.decode().then(() => img.naturalWidth)") > 500
    slider = panel.get_by_label("picture")
    slider.press("Home")
    panel.get_by_text("step 1 (picture 1 of 3)").wait_for()

    panel.get_by_role("tab", name="Pictures").press("ArrowRight")
    assert panel.get_by_role("tab", name="Curves").get_attribute("aria-selected") == "true"
    assert panel.locator(".u-title").all_inner_texts() == [
        "losses",
        "gradient norms",
        "learning rate",
    ]
    over = panel.locator(".u-over").first
    over.hover()  # its middle, on a canvas that is zoomed
    assert panel.locator(".u-value").first.inner_text() in ("10", "11")
    page.screenshot("panel-curves")

    open_short_run(page, second)
    assert "While it runs" in page.line("DMD_Distill")
    page.page.wait_for_timeout(1500)  # longer than a look takes
    assert panel.locator(".u-title").count() == 0
    page.queue()  # the same from the cache
    panel.get_by_text(f"step {STEPS} (picture 3 of 3)").wait_for()
    end.wait_for()

    # without a page: no line of it may come here. With another number of steps it is another run
    prompt = page.api_form()
    (id,) = (id for id, node in prompt.items() if node["class_type"] == "DMD_Distill")
    prompt[id]["inputs"]["steps"] = STEPS - 10
    page.server.run(prompt)
    assert page.line("DMD_Distill") == line

    page.open()
    open_short_run(page, first)
    panel.get_by_text(f"step {STEPS} (picture 3 of 3)").wait_for()
    assert page.line("DMD_Distill") == line
    page.screenshot("panel-pictures")
    assert page.pack_errors == []


def status(server: Server, path: str) -> int:
    try:
        with urllib.request.urlopen(f"{server.address}/dmd-one-step/runs/{path}") as answer:
            code: int = answer.status
            return code
    except urllib.error.HTTPError as error:
        return error.code


def test_the_server_shows_runs_by_their_names_and_nothing_else(
    server: Server, tmp_path: Path
) -> None:
    config = config_of(server.base / "output/dmd_runs")
    train(config)
    outside = config_of(tmp_path)
    train(outside)
    (config.output / "samples/notes.png").write_bytes(b"mine")
    assert status(server, "run") == status(server, "run/step-00000001.png") == 200
    up = "../" * 8
    for name in (str(outside.output), up + str(outside.output)[1:], "..", ".", "run/..", "nobody"):
        assert status(server, quote(name, safe="")) == 404, name
    for file in ("notes.png", "step-00000009.png", "../run.yaml", "../../run/run.yaml"):
        assert status(server, f"run/{quote(file, safe='')}") == 404, file


def test_a_report_opens_without_a_network_and_shows_words_as_words(
    browser: Browser, tmp_path: Path
) -> None:
    hostile = "<img src=x onerror=document.title='ran'>"
    config = config_of(tmp_path)
    train(config)
    moved = config.output.rename(tmp_path / hostile)
    told = {"nfe": 1, "ms_per_image_batch_1": 2.0}
    write_text(moved / "summary.json", json.dumps({"teacher": told, "student": told}))
    report = write_report(RunFolder(config.model_copy(update={"output": moved})))
    context = browser.new_context(
        viewport={"width": 1440, "height": 900}, offline=True, color_scheme="dark"
    )
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url.partition(":")[0]))
    page.on("pageerror", lambda error: asked.append(error.message))
    page.goto(report.as_uri())
    page.get_by_text("step 4 (picture 3 of 3)").wait_for()
    assert page.title() == page.locator("h1").inner_text() == hostile
    assert page.locator(".dmd-numbers td").all_inner_texts()[:3] == [
        "network evaluations",
        "1",
        "1",
    ]
    box = page.locator(".dmd-charts")
    box.press("+")
    ticks = "() => document.querySelector('.dmd-curves button[aria-pressed]').ariaPressed"
    page.get_by_role("button", name="log scale").press("Enter")
    assert page.evaluate(ticks) == "false"
    assert set(asked) <= {"file", "data"}
    ARTEFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTEFACTS / "report.png")
    context.close()
