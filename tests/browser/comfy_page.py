"""What a person does in ComfyUI's page, for tests to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from comfy_host import PACK, PACK_NAME, PromptFailed, PromptRefused, Server
from playwright.sync_api import Page

ARTEFACTS = PACK / "tests/artefacts"


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

    def load(self, workflow: Path | dict[str, Any]) -> None:
        """Open a workflow (the page's own JSON), as dropping its file onto the page does."""
        graph = json.loads(workflow.read_text()) if isinstance(workflow, Path) else workflow
        self.page.evaluate("graph => window.app.loadGraphData(graph)", graph)

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

    def queue(self, timeout: float = 120) -> dict[str, Any]:
        """Press Run and wait for the end: the history entry; raises as `Server.run` does."""
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
