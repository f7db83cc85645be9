"""Prompts of ComfyUI's in API form: each of our nodes with widgets and wires that are wrong."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

from kit.graphs import DIGITS_STUDENT, DIGITS_TEACHER, Graph, Node
from kit.hostile.settings import NASTY_VALUES, NASTY_YAML, SETTINGS
from kit.hostile.values import CONTROL, STRANGE, strange

Nodes = dict[str, Any]
"""What /object_info says of each node."""

FEW = "pairs: 4\npair_steps: 1\npair_batch_size: 2\nbatch_size: 2\ncritic_updates: 1"
"""Settings of a run of a second."""
QUICK: dict[str, dict[str, Any]] = {
    "DMD_Distill": {"steps": 1, "advanced": FEW, "run": "fuzzed"},
    "DMD_TeacherPairs": {"count": 2, "steps": 2, "cfg": 1.0, "sampler_name": "heun"},
    "DMD_Compare": {"count": 1, "teacher_steps": 2, "cfg": 1.0, "sampler_name": "heun"},
    "DMD_SaveStudent": {"save_as": "checkpoint"},
    "DMD_LoadCheckpoint": {"file": DIGITS_TEACHER},
    "DMD_LoadLoRA": {"file": "of-digits.safetensors"},
    "DMD_ContinueRun": {"run": "begun"},
    "DMD_Prompts": {"text": "a fox"},
}
"""Node -> widgets with which it does what it is for, on the digits."""

PLACES = (
    *("../../there/thesis.txt", "../x", "/etc/passwd", "/dev/zero", "..", ".", "/", "\\..\\x"),
    *("dmd_students/../../x.safetensors", "checkpoints//etc/passwd", "checkpoints/../input/a"),
    *("C:\\x", "CON", "nul.txt", "%date:yyyy%", "%width%/%x%", "{0}%s", "a\0b", "x" * 300, "~"),
    *("thesis.txt", "bomb.bin", "checkpoints/bomb.bin", "checkpoints/cut.safetensors", "loras/x"),
)
TEXTS = (
    *(CONTROL, "\ud800", "", " ", "\n", "a\nb", "x" * 1_000_000, "🦊" * 1000, "\u202egnp.exe"),
    *("embedding:../../there/thesis.txt", "(" * 5000, "(a:1e999)", "<lora:x:1>", "\x1b[31m\x07"),
    *("9-0", "0-999999999", "-5", "1,,2", "nan", "9" * 5000, "٣", "7-", "1e3", "999, 999", "5 4 x"),
    *("-1", "1000", "0x10", "999, 749, 499, 249, 0, 0", ", ".join(map(str, range(999, 0, -1)))),
)
NUMBERS = (0, 1, -1, 7, 64, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, 1e308, float("nan"))


def end(graph: Graph, nodes: Nodes, node: Node, random: Random) -> None:
    """Something that wants the node's outputs, where it has no end in itself."""
    kind = nodes[graph[node.id]["class_type"]]
    if not kind["output_node"]:
        graph.add("PreviewAny", source=node[random.randrange(len(kind["output"]))])


class Canvas:
    """Prompts out of these nodes. nodes: with the probe nodes among them."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.ours = sorted(name for name in nodes if name.startswith("DMD_"))

    def prompt(self, random: Random) -> Graph:
        """One of our nodes with what it needs, of which one thing or two are wrong."""
        graph = Graph()
        node = self.whole(graph, random.choice(self.ours), random)
        end(graph, self.nodes, node, random)
        for _ in range(random.choice([1, 1, 2])):
            self.damage(graph, node, random)
        return graph

    def whole(self, graph: Graph, kind: str, random: Random) -> Node:
        """The node as it should be, with all that is wired into it."""
        inputs = {}
        for is_needed, name, (type_, *about) in self.inputs(kind):
            if type_ in FEEDS:
                if is_needed or random.random() < 0.3:
                    inputs[name] = self.fed(graph, kind, type_, random)
            elif is_needed:
                inputs[name] = about[0].get("default") if about else None
                if inputs[name] is None and type_ == "COMBO":
                    inputs[name] = next(iter(about[0]["options"]), "")
        return graph.add(kind, **inputs | QUICK.get(kind, {}))

    def inputs(self, kind: str) -> list[tuple[bool, str, Any]]:
        """Whether it is needed, name, and type with options, of each input."""
        told = self.nodes[kind]["input"]
        return [
            (part == "required", name, about)
            for part in ("required", "optional")
            for name, about in told.get(part, {}).items()
        ]

    def is_miswired(self, prompt: dict[str, Any]) -> bool:
        """Whether a socket of ours has in it what no page could put there.

        ComfyUI looks at the types of wires alone, not at a value in the place of one, nor at a
        wire of any type: all nodes, its own too, fail on those wherever they first use them.
        """
        for node in prompt.values():
            kind = node.get("class_type")
            if kind not in self.ours or not isinstance(node.get("inputs"), dict):
                continue
            for _, name, (type_, *_) in self.inputs(kind):
                value = node["inputs"].get(name)
                match value:
                    case [str(source_id), *_]:
                        source = prompt.get(source_id)
                    case _:
                        source = None
                is_any = source is not None and source["class_type"] == "Probe_Any"
                if name in node["inputs"] and type_ in FEEDS and (is_any or not source):
                    return True
                if type_ in ("INT", "FLOAT") and is_any:
                    return True
        return False

    def fed(self, graph: Graph, kind: str, type_: str, random: Random) -> Any:
        if type_ == "MODEL" and kind in ("DMD_OneStepSampler", "DMD_ModelSampling"):
            return graph.add("DMD_LoadCheckpoint", file=DIGITS_STUDENT)
        if kind == "DMD_SaveStudent" and type_ == "MODEL":
            return self.whole(graph, "DMD_Distill", random)
        return FEEDS[type_](self, graph, random)

    def damage(self, graph: Graph, node: Node, random: Random) -> None:
        """One of the node's inputs, or what kind of node it is."""
        kind, inputs = graph[node.id]["class_type"], graph[node.id]["inputs"]
        if kind not in self.ours or not isinstance(inputs, dict):
            return
        _, name, about = random.choice(self.inputs(kind))
        match random.randrange(12):
            case 0:
                inputs.pop(name, None)
            case 1:
                inputs[random.choice(["unknown", CONTROL, "__class__", "cls"])] = strange(random)
            case 2:  # past what ComfyUI looks at: a wire of any type
                text = random.choice([*PLACES, *TEXTS])
                inputs[name] = graph.add("Probe_Any", text=text)[0]
            case 3:
                inputs[name] = {"__value__": strange(random)}
            case 4:
                wire: list[Any] = [random.choice([node.id, "0", "99", 0, None, ""]), 0]
                wire[1] = random.choice([0, 1, 99, -1, 0.5, "0", None])
                inputs[name] = random.choice([wire, wire[:1], [*wire, 0], [wire, 0]])
            case 5:
                other = self.fed(graph, kind, random.choice(list(FEEDS)), random)
                inputs[name] = other[0] if isinstance(other, Node) else other
            case 6 if random.random() < 0.3:
                graph[node.id] |= random.choice(
                    [{"class_type": strange(random)}, {"inputs": strange(random)}]
                )
            case _:
                inputs[name] = self.value(about, random)

    def value(self, about: Any, random: Random) -> Any:
        """A value for a widget or a socket of this type."""
        type_, options = about[0], about[1] if len(about) > 1 else {}
        if random.random() < 0.15:
            return strange(random)
        match type_:
            case "INT" | "FLOAT":
                least, most = options.get("min", 0), options.get("max", 1)
                return random.choice([least, most, least - 1, most + 1, *NUMBERS])
            case "STRING" if "\n" in str(options.get("tooltip", "")) or options.get("multiline"):
                key, nasty = random.choice(SETTINGS), random.choice(NASTY_VALUES)
                several = [f"{key}: {nasty}", f"{FEW}\n{key}: {nasty}", random.choice(NASTY_YAML)]
                return random.choice([*several, random.choice(TEXTS)])
            case "COMBO" if random.random() < 0.5 and options.get("options"):
                return random.choice(options["options"])
            case "STRING" | "COMBO":
                return random.choice([*PLACES, *TEXTS])
        return random.choice([*STRANGE, *TEXTS])


def _model(canvas: Canvas, graph: Graph, random: Random) -> Any:
    return graph.add("DMD_LoadCheckpoint", file=DIGITS_TEACHER)


Feed = Callable[[Canvas, Graph, Random], Any]
FEEDS: dict[str, Feed] = {
    "MODEL": _model,
    "CLIP": lambda canvas, graph, random: graph.add("Probe_RandomClip", family="sd15"),
    "VAE": lambda canvas, graph, random: _model(canvas, graph, random)[2],
    "CONDITIONING": lambda canvas, graph, random: graph.classes(),
    "LATENT": lambda canvas, graph, random: canvas.whole(graph, "DMD_EmptyLatent", random),
    "DMD_PAIRS": lambda canvas, graph, random: canvas.whole(graph, "DMD_TeacherPairs", random),
}
"""Type of a socket -> what is wired into it."""


def spoiled(workflow: dict[str, Any], random: Random) -> dict[str, Any]:
    """A workflow of the page's with a thing or some of it wrong."""
    workflow = json.loads(json.dumps(workflow))
    for _ in range(random.choice([1, 1, 2, 5])):
        nodes, links = workflow.get("nodes"), workflow.get("links")
        if not isinstance(nodes, list) or not nodes or not isinstance(links, list) or not links:
            break
        ours = [node for node in nodes if str(node.get("type")).startswith("DMD_")] or nodes
        node, link = random.choice(ours), random.choice(links)
        widgets = node.get("widgets_values")
        match random.randrange(11):
            case 0:
                nodes.remove(node)
            case 1:
                links.remove(link)
            case 2:
                link[random.randrange(len(link))] = random.choice([-1, 99, None, "x", 10**30, {}])
            case 3:
                node["type"] = random.choice(["NoSuchNode", "DMD_NoSuchNode", "", None, CONTROL])
            case 4:
                node[random.choice(list(node))] = strange(random)
            case 5:
                node["id"] = random.choice([nodes[0].get("id"), -1, "x", 10**30])
            case 6 if isinstance(widgets, list):
                widgets.insert(random.randrange(len(widgets) + 1), strange(random))
            case 7 if isinstance(widgets, list):
                node["widgets_values"] = widgets[: random.randrange(len(widgets) or 1)]
            case 8:
                workflow[random.choice(list(workflow))] = strange(random)
            case _ if isinstance(widgets, list) and widgets:
                odd = random.choice([strange(random), random.choice([*PLACES, *TEXTS])])
                widgets[random.randrange(len(widgets))] = odd
    return workflow
