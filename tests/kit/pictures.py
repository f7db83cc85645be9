"""The pictures that the repository shows: workflows/*.jpg and two of docs/*.png.

    PYTHONPATH=.:tests python tests/kit/pictures.py [WORKFLOW ...]

Run it after a change of a workflow, and look at what it made. One of them trains for two minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kit.comfy_host import PACK, Server
from kit.comfy_page import SETTINGS, ComfyPage, launch
from kit.stand_ins import put_files
from PIL import Image
from playwright.sync_api import sync_playwright

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
QUICKSTART = "quickstart-digits"
README_PICTURES = {QUICKSTART: "quickstart.png", "distil-digits": "distil-digits.png"}
"""Workflow -> its picture in docs/, after a run."""
THUMBNAIL_WIDTH = 800


def graph_picture(page: ComfyPage, name: str) -> Image.Image:
    """The graph alone, without the page's bars around it."""
    page.fit()
    picture = Image.open(page.screenshot(name)).convert("RGB")
    return picture.crop(page.graph_box())


def digit_sheet(files: list[Path]) -> Image.Image:
    """Ten digits of the student in two rows, and the teacher's below."""
    cell, gap = 128, 12
    pitch = cell + gap
    sheet = Image.new("RGB", (5 * pitch + gap, 4 * pitch + 3 * gap), "#2c4a3a")
    sheet.paste("#1f3d50", (0, 2 * pitch + gap + gap // 2, *sheet.size))
    for i, file in enumerate(files):
        row, column = divmod(i, 5)
        with Image.open(file) as picture:
            top = gap + pitch * row + (2 * gap if row >= 2 else 0)
            sheet.paste(picture, (gap + pitch * column, top))
    return sheet


def thumbnail(picture: Image.Image) -> Image.Image:
    height = round(picture.height * THUMBNAIL_WIDTH / picture.width)
    return picture.resize((THUMBNAIL_WIDTH, height), Image.Resampling.LANCZOS)


def main(chosen: list[str]) -> None:
    with Server() as server, sync_playwright() as playwright:
        put_files(server.base / "models")  # or the newer pages mark the load nodes red
        server.post("/settings", SETTINGS)
        browser = launch(playwright)
        context = browser.new_context(viewport={"width": 1920, "height": 1100})
        page = ComfyPage(context.new_page(), server, "classic")
        page.open()
        for workflow in WORKFLOWS:
            name = workflow.stem
            if chosen and name not in chosen:
                continue
            page.load(workflow)
            digits = []
            if name in README_PICTURES:
                digits = server.output_files(page.queue(timeout=900))
            picture = graph_picture(page, name)
            if name in README_PICTURES:
                picture.save(PACK / "docs" / README_PICTURES[name], optimize=True)
            small = digit_sheet(digits) if name == QUICKSTART else thumbnail(picture)
            small.save(workflow.with_suffix(".jpg"), quality=82, optimize=True)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
