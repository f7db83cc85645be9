"""ComfyUI's page in a real Chromium, with this pack in it.

`page` stays open for the tests of a module, and each starts from an empty graph. It comes twice,
once for each way in which ComfyUI draws nodes; a test that needs only one says
`@pytest.mark.parametrize("page", ["classic"], indirect=True)`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kit.comfy_host import Server
from kit.comfy_page import RENDERERS, ComfyPage, launch, opened
from playwright.sync_api import Browser, sync_playwright


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, of a module: while it lives, asyncio.run fails in this thread."""
    with sync_playwright() as playwright:
        chromium = launch(playwright)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module", params=RENDERERS)
def page(request: pytest.FixtureRequest, server: Server, browser: Browser) -> Iterator[ComfyPage]:
    with opened(server, browser, request.param) as comfy:
        yield comfy


@pytest.fixture(autouse=True)
def empty_graph(request: pytest.FixtureRequest) -> None:
    if "page" in request.fixturenames:
        request.getfixturevalue("page").clear()
