"""What a long node shows while it works: its bar, the time left, a picture; and its stop."""

import time

import comfy.model_management
import comfy.utils
from PIL.Image import Image
from server import PromptServer

PICTURE_SIZE = 1024
"""Longest side of a preview, in pixels."""

EVERY = 0.5
"""Seconds between two lines of text."""

EVERY_BAR = 0.1
"""Seconds between two events for the bar: a round may take less, and training shares the time."""


class Progress:
    """Bar and text of `total` rounds of `what` on node `node_id`, `done` of them there before."""

    def __init__(self, what: str, total: int, node_id: str, done: int = 0) -> None:
        self.what, self.total, self.node_id = what, total, node_id
        self.before = done
        self.since = self.said = self.drawn = time.monotonic()
        self.bar = comfy.utils.ProgressBar(total, node_id)

    def update(self, done: int, note: str = "", picture: Image | None = None) -> None:
        """Raises InterruptProcessingException where the user has pressed stop."""
        now = time.monotonic()
        if picture or now - self.drawn >= EVERY_BAR or done >= self.total:
            self.drawn = now
            preview = ("JPEG", picture, PICTURE_SIZE) if picture else None
            self.bar.update_absolute(done, self.total, preview)
        if now - self.said >= EVERY or done >= self.total:
            self.said = now
            say(f"{self.what} {done} of {self.total}, {self._left(done, now)} left{note}", self)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def _left(self, done: int, now: float) -> str:
        made = max(1, done - self.before)
        seconds = round((now - self.since) / made * (self.total - done))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def say(text: str, where: "Progress | str", run: str = "") -> None:
    """A line of text on a node while it runs. where: its progress, or its id. run: that it is at.

    It goes to the page that queued the running prompt and names its workflow: the page may show
    another by now, with another node of that id. ComfyUI's own progress text goes to every page.
    """
    node_id = where if isinstance(where, str) else where.node_id
    server = PromptServer.instance
    if server.client_id is None:  # a prompt that no page has queued; None would be all pages
        return
    said = {"node": node_id, "text": text, "run": run, **_running_prompt()}
    server.send_sync("dmd-one-step.said", said, server.client_id)


def _running_prompt() -> dict[str, str]:
    """Its id, and its workflow's where the page has sent one."""
    for _, prompt_id, _, extra, *_ in PromptServer.instance.prompt_queue.currently_running.values():
        workflow = (extra.get("extra_pnginfo") or {}).get("workflow") or {}
        return {"prompt_id": prompt_id, "workflow": workflow.get("id") or ""}
    return {}
