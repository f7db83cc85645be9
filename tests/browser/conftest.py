"""ComfyUI's page in a real Chromium, with this pack in it.

`page` comes twice, once for each way in which ComfyUI draws nodes; a test that needs only one says
`@pytest.mark.parametrize("page", ["classic"], indirect=True)`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kit.comfy_host import PROBE_NODES, Server
from kit.comfy_page import RENDERERS, ComfyPage, opened
from playwright.sync_api import Browser, Playwright, sync_playwright

CHROMIUM = "/usr/bin/chromium"  # tests/install_system.sh

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def launch(playwright: Playwright) -> Browser:
    return playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Not the server of tests/comfyui: the page's settings and queue are one per server."""
    with Server([PROBE_NODES]) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Of a module, not of the session: while it lives, asyncio.run fails in this thread."""
    with sync_playwright() as playwright:
        chromium = launch(playwright)
        yield chromium
        chromium.close()


@pytest.fixture(params=RENDERERS)
def page(request: pytest.FixtureRequest, server: Server, browser: Browser) -> Iterator[ComfyPage]:
    with opened(server, browser, request.param) as comfy:
        yield comfy
