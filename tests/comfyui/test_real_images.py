"""DMD Real Images: a folder or a batch of pictures into DMD Distill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from kit.comfy_host import Server
from kit.distil_graphs import SD, digits, failure, headless, run_of, sd15_run
from kit.graphs import Graph
from kit.runs import metrics, newest, same_files
from PIL import Image

from dmd_train.networks.digits import digits as data_set

QUICK = {"critic_updates": 1, "regression_weight": 0, "checkpoint_every": 2}
"""Settings of a digits run without pairs."""


def put_digits(server: Server, count: int = 12) -> str:
    """Some of the data set in input/, in folders named after their classes."""
    data = data_set()
    for i in range(count):
        file = server.base / f"input/own-digits/{data.label[i]}/{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = ((data.image[i, 0].numpy() + 1) * 127.5).astype(np.uint8)
        Image.fromarray(pixels).save(file)
    return "own-digits"


def test_a_folder_of_classes_gives_the_headless_run_bit_for_bit(
    server: Server, tmp_path: Path
) -> None:
    graph = Graph()
    real = graph.add("DMD_RealImages", folder=put_digits(server), flip=False)
    digits(graph, steps=3, run="own digits", advanced=QUICK, images=real)
    server.run(graph)
    run = run_of(server, "own digits")
    assert "critic/adversarial" in metrics(run)[-1]
    headless(run / "run.yaml", tmp_path / "headless")
    assert same_files(newest(run), newest(tmp_path / "headless"))


def test_a_batch_of_images_is_encoded_by_the_vae_and_without_one_the_node_says_so(
    server: Server,
) -> None:
    def run(name: str, with_vae: bool) -> Graph:
        graph = Graph()
        loaded = graph.add("CheckpointLoaderSimple", ckpt_name="sd15-clip.safetensors")
        pictures = graph.add("EmptyImage", width=96, height=64, batch_size=2, color=255)
        real = graph.add(
            "DMD_RealImages", folder="none: the wired images", flip=True, images=pictures
        )
        vae = {"vae": loaded[2]} if with_vae else {}
        few = SD | {"critic_updates": 1}
        sd15_run(server, graph, loaded, steps=1, run=name, advanced=few, images=real, **vae)
        return graph

    sd15_run(server, Graph())  # puts the checkpoint there
    assert "images: wire the VAE of this model" in failure(server, run("no vae", False))
    server.run(run("own images", True))
    assert "student/adversarial" in metrics(run_of(server, "own images"))[-1]


def test_neither_folder_nor_images_is_one_line(server: Server) -> None:
    graph = Graph()
    real = graph.add("DMD_RealImages", folder="none: the wired images", flip=False)
    digits(graph, steps=1, run="nothing", advanced=QUICK, images=real)
    assert "choose a folder or wire images, one of the two" in failure(server, graph)
