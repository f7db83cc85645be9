"""DMD Prompts: each prompt as CLIP Text Encode has it, from a list that is a widget or a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kit.checkpoints import tiny_sd15
from kit.comfy_host import Server
from kit.graphs import Graph, Node, failed, put
from kit.probe_nodes.conditions import WIDTH
from safetensors import safe_open
from torch import Tensor

from dmd_train.data.prompts import read_prompts

TEXT, SHIPPED = "the text below", "the shipped list"
FOX = "a red fox in the snow"
LONG = "a very " + "long " * 100 + "road"


def encoder(graph: Graph, family: str = "sd15") -> Node:
    return graph.add("Probe_RandomClip", family=family)


def prompts(graph: Graph, clip: object, text: str = "", source: object = TEXT) -> Node:
    return graph.add("DMD_Prompts", clip=clip, source=source, text=text)


def saved(server: Server, graph: Graph, *wires: object) -> list[tuple[dict[str, Tensor], dict]]:
    """Run the graph; of each CONDITIONING its tensors and texts, see Probe_SaveConditions."""
    for i, wire in enumerate(wires):
        graph.add("Probe_SaveConditions", conditioning=wire, name=f"conditions-{i}")
    graph.shown = server.run(graph)["outputs"]
    found = []
    for i in range(len(wires)):
        with safe_open(server.base / f"output/conditions-{i}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
            found.append((tensors, file.metadata() or {}))
    return found


def texts(found: tuple[dict[str, Tensor], dict[str, str]]) -> list[str]:
    metadata = found[1]
    return [metadata[f"{i}.dmd_prompt"] for i in range(len(metadata))]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_each_prompt_is_what_clip_text_encode_makes_of_it_in_half_precision(
    server: Server, family: str
) -> None:
    graph = Graph()
    clip = encoder(graph, family)
    ours = prompts(graph, clip, f"{FOX}\n\n  {LONG} \n{FOX}\n\t\n")
    found, fox, long = saved(
        server, graph, ours, *(graph.add("CLIPTextEncode", clip=clip, text=t) for t in (FOX, LONG))
    )
    assert texts(found) == [FOX, LONG]
    assert graph.shown[ours.id]["text"] == [f"2 prompts, the first: {FOX}"]
    for i, (stock, _) in enumerate((fox, long)):
        assert {f"{i}{key[1:]}" for key in stock} == {key for key in found[0] if key[0] == str(i)}
        for key, value in stock.items():
            own = found[0][f"{i}{key[1:]}"]
            assert own.dtype == torch.half
            assert torch.equal(own, value.half())
    assert found[0]["1"].shape[1] > found[0]["0"].shape[1] == 77


def test_the_negative_is_the_empty_prompt_and_of_sdxl_zeros(server: Server) -> None:
    graph = Graph()
    sd15, sdxl = encoder(graph), encoder(graph, "sdxl")
    stock = graph.add("CLIPTextEncode", clip=sd15, text="")
    zeros = graph.add(
        "ConditioningZeroOut", conditioning=graph.add("CLIPTextEncode", clip=sdxl, text="")
    )
    first, second = (prompts(graph, clip, FOX)[1] for clip in (sd15, sdxl))
    found = saved(server, graph, first, stock, second, zeros)
    for ours, theirs in (found[:2], found[2:]):
        assert ours[0].keys() == theirs[0].keys()
        assert all(torch.equal(ours[0][key], theirs[0][key].half()) for key in ours[0])
        assert texts(ours) == [""]
    assert found[0][0]["0"].any()
    assert found[2][0].keys() == {"0", "0.pooled_output"}
    assert not any(value.any() for value in found[2][0].values())


def test_files_of_the_input_folder_are_offered_and_read_again_once_edited(server: Server) -> None:
    file = server.base / "input/lists/animals.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes("\ufeffa fox\r\nthe Ümlaut\r\n".encode())
    (server.base / "input/lists/picture.png").touch()
    ((_, more),) = [server.object_info()["DMD_Prompts"]["input"]["required"]["source"]]
    assert {TEXT, SHIPPED, "lists/animals.txt"} <= set(more["options"])
    assert not [name for name in more["options"] if name.endswith(".png")]

    def found() -> list[str]:
        graph = Graph()
        return texts(
            saved(
                server,
                graph,
                prompts(graph, encoder(graph), "not this", "lists/animals.txt"),
            )[0]
        )

    assert found() == ["a fox", "the Ümlaut"]
    file.write_text("a bear\n")
    assert found() == ["a bear"]


def test_the_shipped_list_is_the_engines(server: Server) -> None:
    graph = Graph()
    (found,) = saved(server, graph, prompts(graph, encoder(graph), source=SHIPPED))
    assert texts(found) == read_prompts(None)


def refusal(server: Server, graph: Graph, wire: object) -> str:
    graph.add("Probe_SaveConditions", conditioning=wire, name="refused")
    failure = failed(server, graph)
    assert failure.node_type == "DMD_Prompts"
    return failure.message


@pytest.mark.parametrize("name", ["../secret.txt", "{base}/secret.txt", "nothing.txt"])
def test_a_text_outside_of_the_input_folder_is_never_read(server: Server, name: str) -> None:
    (server.base / "secret.txt").write_text("a secret\n")
    graph = Graph()
    named = name.format(base=server.base)
    source = graph.add("Probe_Any", text=named)
    message = refusal(server, graph, prompts(graph, encoder(graph), source=source))
    assert f"'{named}' is no .txt file of the input folder" in message


def test_a_checkpoint_without_text_encoder_is_told_in_one_line(server: Server) -> None:
    graph = Graph()
    bare = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd15))
    message = refusal(server, graph, prompts(graph, bare[1], FOX))
    assert "holds no text encoder" in message and "Load CLIP" in message


@pytest.mark.parametrize("source", [TEXT, "blank.txt"])
def test_a_list_without_prompts_is_refused_by_its_name(server: Server, source: str) -> None:
    Path(server.base, "input/blank.txt").write_text("\n  \n")
    graph = Graph()
    message = refusal(server, graph, prompts(graph, encoder(graph), " \n\n", source))
    assert message.endswith(f"{source}: holds no prompts. Write one a line.")


def test_more_prompts_than_memory_holds_are_refused_after_the_first(server: Server) -> None:
    graph = Graph()
    text = "\n".join(map(str, range(500_000)))
    message = refusal(server, graph, prompts(graph, encoder(graph), text))
    size = (77 * WIDTH + WIDTH) * 2
    assert f"500000 prompts would take {500_000 * size / 2**30:.1f} GiB" in message
    assert f"first {4 * 2**30 // size}," in message
