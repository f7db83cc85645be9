"""Our text encoder says of a prompt what ComfyUI's says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kit import clip_layout
from kit.checkpoints import tiny_sd15
from kit.comfy_host import Server
from kit.exported import (
    CPU,
    EXACT,
    OFF,
)
from kit.graphs import Graph, error, models, put
from safetensors.torch import load_file

from dmd_train.networks.load import load

PROMPTS = (
    "a red fox in the snow",
    "Ein Käse-Soufflé, naïve crème brûlée — São Paulo, 1987!",
    "it's the artist's 3rd self-portrait: oil/canvas, 50% grey; \"no title\" #7? 日本 🦊",
)


def test_a_full_clip_says_of_three_prompts_what_our_text_encoder_says(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        clip_layout.PARTS, 768, [("cond_stage_model.transformer.text_model.", 768, 12)]
    )

    def clip_l(path: Path) -> None:
        tiny_sd15(path, clip=True)

    path = models(server, "checkpoints", put(server, clip_l))
    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=path.name)
    for i, prompt in enumerate(PROMPTS):
        text = graph.add("CLIPTextEncode", clip=loaded[1], text=prompt)
        graph.add("Probe_SaveConditioning", conditioning=text, name=f"clip-{i}")
    server.run(graph)
    theirs = torch.cat(
        [load_file(server.base / f"output/clip-{i}.safetensors")["text"] for i in range(3)]
    )
    encoder = load(str(path), CPU).text
    path.unlink()
    assert encoder
    ours = encoder.encode(list(PROMPTS))["text"]
    errors = [error(a, b) for a, b in zip(theirs, ours, strict=True)]
    print("clip", errors)
    assert max(errors) <= EXACT
    assert error(ours[1:2], ours[:1]) > OFF
