"""Files of any name in the load nodes."""

from kit.checkpoints import tiny_sd15
from kit.comfy_host import Server
from kit.graphs import Graph, put, sample, told


def test_a_file_with_a_percent_sign_in_its_name_is_loaded_without_its_missing_text_encoder(
    server: Server,
) -> None:
    name = put(server, tiny_sd15, "100%s of %d.safetensors")
    graph = Graph()
    loaded = graph.add("DMD_LoadCheckpoint", file=f"checkpoints/{name}")
    model = graph.model_sampling(loaded, "SD 1.5, 1 step")
    sample(server, graph, graph.one_step(model, graph.condition("sd15")))
    assert told(graph, loaded).startswith("SD 1.x, LDM single file with VAE")
