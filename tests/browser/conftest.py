"""ComfyUI's page in a real Chromium, with this pack in it.

`page` comes twice, once for each way in which ComfyUI draws nodes; a test that needs only one says
`@pytest.mark.parametrize("page", ["classic"], indirect=True)`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from comfy_host import PACK, Server
from comfy_page import ComfyPage
from playwright.sync_api import Browser, Playwright, Route, sync_playwright

CHROMIUM = "/usr/bin/chromium"  # tests/install_system.sh
PROBE_NODES = PACK / "tests/comfy/probe_nodes"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # or a Templates dialog covers the canvas
    "Comfy.Workflow.Persist": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}


def launch(playwright: Playwright) -> Browser:
    return playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Not the server of tests/comfy: the page's settings and queue are one per server."""
    with Server([PROBE_NODES]) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Of a module, not of the session: while it lives, asyncio.run fails in this thread."""
    with sync_playwright() as playwright:
        chromium = launch(playwright)
        yield chromium
        chromium.close()


@pytest.fixture(params=["classic", "nodes-2.0"])
def page(request: pytest.FixtureRequest, server: Server, browser: Browser) -> Iterator[ComfyPage]:
    server.post("/settings", SETTINGS | {"Comfy.VueNodes.Enabled": request.param == "nodes-2.0"})

    def only_the_server(route: Route) -> None:
        if route.request.url.startswith(server.address):
            route.continue_()
        else:
            route.abort()

    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    context.route("**/*", only_the_server)
    comfy = ComfyPage(context.new_page(), server, request.param)
    comfy.open()
    yield comfy
    context.close()
