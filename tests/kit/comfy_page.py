"""What a person does in ComfyUI's page, for tests to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit.comfy_host import PACK, PACK_NAME, PromptFailed, PromptRefused, Server
from playwright.sync_api import Browser, Locator, Page, Playwright

CHROMIUM = "/usr/bin/chromium"  # tests/install_system.sh
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the server and nothing else
]
ARTEFACTS = PACK / "tests/artefacts"
RENDERERS = ["classic", "nodes-2.0"]
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # or a Templates dialog covers the canvas
    "Comfy.Workflow.Persist": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}
EMPTY: dict[str, Any] = {
    "version": 0.4,
    "last_node_id": 0,
    "last_link_id": 0,
    "nodes": [],
    "links": [],
    "groups": [],
    "config": {},
    "extra": {},
}
"""A workflow."""


class ComfyPage:
    """ComfyUI's page: open a workflow, run it, look at it."""

    def __init__(self, page: Page, server: Server, renderer: str) -> None:
        self.page = page
        self.server = server
        self.renderer = renderer
        self.pack_errors: list[str] = []
        """What the console says that comes from this pack's own scripts; ComfyUI's are not ours."""
        page.on("pageerror", lambda error: self._note(error.stack or error.message))
        page.on(
            "console",
            lambda line: (
                self._note(f"{line.location['url']}: {line.text}") if line.type == "error" else None
            ),
        )

    def _note(self, text: str) -> None:
        if f"/extensions/{PACK_NAME}/" in text:
            self.pack_errors.append(text)

    def open(self) -> None:
        """Load the page and wait until its nodes are registered."""
        self.page.goto(self.server.address)
        self.page.wait_for_function(
            "() => !!(window.app?.graph && window.LiteGraph?.registered_node_types?.KSampler)",
            timeout=60_000,
        )

    def clear(self) -> None:
        """Forget the open workflow, what nodes have shown, and the pack's errors."""
        self.page.evaluate("() => { window.app.nodeOutputs = {} }")
        self.load(EMPTY)
        self.pack_errors.clear()

    def load(self, workflow: Path | dict[str, Any]) -> None:
        """Open a workflow (the page's own JSON), as dropping its file onto the page does."""
        graph = json.loads(workflow.read_text()) if isinstance(workflow, Path) else workflow
        self.page.evaluate("graph => window.app.loadGraphData(graph)", graph)

    def drawn(self) -> None:
        """Wait for five frames: nodes have their places after one, their sizes after four."""
        self.page.evaluate(
            """async () => {
                for (let frame = 0; frame < 5; frame++) await new Promise(requestAnimationFrame)
            }"""
        )

    def members(self) -> dict[str, list[int]]:
        """Title of a group -> the nodes that stand in it, once the page has drawn them."""
        self.drawn()
        members: dict[str, list[int]] = self.page.evaluate(
            """() => Object.fromEntries(window.app.graph.groups.map(group => {
                const [left, top, width, height] = group.boundingRect
                const inside = ({ pos: [x, y] }) =>
                    left <= x && x < left + width && top <= y && y < top + height
                return [group.title, window.app.graph.nodes.filter(inside).map(node => +node.id)]
            }))"""
        )
        return members

    def fit(self) -> None:
        """Zoom so that the whole graph is in view, and wait until it is drawn."""
        self.page.evaluate(
            "() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')"
        )
        self.page.wait_for_timeout(1500)  # the page flies there

    def graph_box(self) -> tuple[int, int, int, int]:
        """Where the graph stands in a screenshot: left, top, right, bottom, with a little rim."""
        box: list[float] = self.page.evaluate(
            """() => {
                const { graph, canvas } = window.app
                const boxes = [...graph.nodes, ...graph.groups].map(item => item.boundingRect)
                const corners = boxes.map(([x, y, w, h]) => [x, y, x + w, y + h])
                const edge = (i, pick) => pick(...corners.map(corner => corner[i]))
                const at = (x, y) => canvas.ds.convertOffsetToCanvas([x, y])
                const { left, top } = canvas.canvas.getBoundingClientRect()
                const [x0, y0] = at(edge(0, Math.min) - 20, edge(1, Math.min) - 20)
                const [x1, y1] = at(edge(2, Math.max) + 20, edge(3, Math.max) + 20)
                return [left + x0, top + y0, left + x1, top + y1]
            }"""
        )
        left, top, right, bottom = map(round, box)
        return left, top, right, bottom

    def lines(self) -> list[Locator]:
        """The lines that this pack draws on its nodes, from the top of the graph down."""
        lines = self.page.locator(".dmd-summary")
        lines.first.wait_for(state="attached")
        return lines.all()

    def images(self) -> list[list[dict[str, str]]]:
        """The pictures that the page holds for each node that shows any."""
        shown: list[list[dict[str, str]]] = self.page.evaluate(
            "() => Object.values(window.app.nodeOutputs).map(o => o.images).filter(Boolean)"
        )
        return shown

    def missing_nodes(self) -> list[str]:
        """Node types of the open workflow, subgraphs included, that no installed pack has."""
        missing: list[str] = self.page.evaluate(
            """() => {
                const root = window.app.graph
                const graphs = [root, ...(root.subgraphs?.values() ?? [])]
                return graphs.flatMap(graph => graph.nodes.map(node => node.type))
                    .filter(type => !(type in window.LiteGraph.registered_node_types))
            }"""
        )
        return missing

    def api_form(self) -> dict[str, Any]:
        """The open workflow as the page would send it to /prompt."""
        prompt: dict[str, Any] = self.page.evaluate(
            "async () => (await window.app.graphToPrompt()).output"
        )
        return prompt

    def line(self, node_type: str) -> str:
        """What the line says that this pack draws on the (first) node of a type."""
        text: str = self.page.evaluate(
            """type => {
                const { element } = window.app.graph.nodes.find(node => node.type === type)
                    .widgets.find(widget => widget.element?.matches(".dmd-summary"))
                return element.checkVisibility() ? element.innerText : "hidden"
            }""",
            node_type,
        )
        return text

    def listen(self) -> None:
        """Keep what our running nodes say from now on: `told`."""
        self.page.evaluate(
            """() => {
                const { told } = window
                window.told = []
                if (told) return
                const { api } = window.app
                api.addEventListener("dmd-one-step.said", ({ detail }) => {
                    if (detail.text) window.told.push(detail.text)
                })
            }"""
        )

    def told(self) -> list[str]:
        """Every progress text since `listen`."""
        texts: list[str] = self.page.evaluate("() => window.told")
        return texts

    def set_widgets(self, node_type: str, **values: Any) -> None:
        """Type into widgets of the (first) node of a type."""
        self.page.evaluate(
            """([type, values]) => {
                const node = window.app.graph.nodes.find(node => node.type === type)
                for (const widget of node.widgets)
                    if (widget.name in values) widget.value = values[widget.name]
            }""",
            [node_type, values],
        )

    def look_at(self, *node_types: str) -> None:
        """Zoom to the nodes of these types, clear of the page's bars."""
        self.page.evaluate(
            """types => {
                const { graph, canvas } = window.app
                const nodes = graph.nodes.filter(({ type }) => types.includes(type))
                const boxes = nodes.map(node => node.boundingRect)
                const left = Math.min(...boxes.map(([x]) => x))
                const top = Math.min(...boxes.map(([, y]) => y))
                const width = Math.max(...boxes.map(([x, , w]) => x + w)) - left
                const height = Math.max(...boxes.map(([, y, , h]) => y + h)) - top
                const { clientWidth, clientHeight } = canvas.canvas
                const scale = Math.min((clientWidth - 120) / width, (clientHeight - 160) / height)
                canvas.ds.scale = scale
                canvas.ds.offset = [80 / scale - left, 130 / scale - top]
                canvas.setDirty(true, true)
            }""",
            list(node_types),
        )
        self.drawn()

    def queue(self, timeout: float = 120) -> dict[str, Any]:
        """Press Run and wait for the end: the history entry; raises as `Server.run` does."""
        self.press_run()
        return self.wait_for_end(timeout)

    def press_run(self) -> None:
        """Queue the open workflow."""
        self.page.evaluate(
            """() => {
                window.runEnd = null
                for (const name of ["success", "error", "interrupted"])
                    window.app.api.addEventListener(
                        `execution_${name}`,
                        ({ type, detail }) => (window.runEnd = { event: type, detail }),
                        { once: true },
                    )
            }"""
        )
        with self.page.expect_response(
            lambda answer: answer.request.method == "POST" and answer.url.endswith("/prompt")
        ) as answer:
            self.page.evaluate("() => window.app.queuePrompt(0, 1)")
        if answer.value.status == 400:
            raise PromptRefused(answer.value.json())

    def press_stop(self) -> None:
        """What the red button beside Run does."""
        self.page.evaluate("() => window.app.api.interrupt()")

    def wait_for_end(self, timeout: float = 120) -> dict[str, Any]:
        """The history entry of what `press_run` queued; raises as `Server.run` does."""
        self.page.wait_for_function("() => window.runEnd", timeout=timeout * 1000)
        end = self.page.evaluate("() => window.runEnd")
        if end["event"] != "execution_success":
            raise PromptFailed(end["event"], end["detail"])
        return self.server.wait(end["detail"]["prompt_id"])

    def screenshot(self, name: str) -> Path:
        """The page as a picture: tests/artefacts/NAME-RENDERER.png."""
        ARTEFACTS.mkdir(exist_ok=True)
        file = ARTEFACTS / f"{name}-{self.renderer}.png"
        self.page.screenshot(path=file)
        return file


def launch(playwright: Playwright) -> Browser:
    """Debian's Chromium, without a window."""
    return playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@contextmanager
def opened(server: Server, browser: Browser, renderer: str) -> Iterator[ComfyPage]:
    """The page, drawing nodes in one of RENDERERS."""
    server.post("/settings", SETTINGS | {"Comfy.VueNodes.Enabled": renderer == "nodes-2.0"})
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    comfy = ComfyPage(context.new_page(), server, renderer)
    comfy.open()
    yield comfy
    context.close()
