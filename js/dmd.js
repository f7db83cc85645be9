// One line on each of our nodes: what a file is, how far a run has come, what came of it.
// The nodes say it themselves (their progress text, and `ui={"text": [...]}` when they are done);
// this only shows it, and says once more, large, what a stopped node has saved.

import { app } from "../../scripts/app.js"
import { listen, recall } from "./said.js"

const OF_A_FILE = "Run once to read here what the file is and how it samples."
const OF_A_RUN =
  "While it runs: step, time left and a picture. Stop it when you like: it saves, and Run goes on."

const BEFORE_THE_FIRST_RUN = {
  DMD_LoadCheckpoint: OF_A_FILE,
  DMD_LoadLoRA: OF_A_FILE,
  DMD_Prompts: "Run once to read here how many prompts there are.",
  DMD_TeacherPairs: "Stop it when you like: finished pairs are kept, and Run goes on.",
  DMD_Distill: OF_A_RUN,
  DMD_ContinueRun: OF_A_RUN,
  DMD_Compare: "Run once to read here what a picture costs with each of the two.",
  DMD_SaveStudent: "Run once to read here where the file is.",
}
const SAVES_WHEN_STOPPED = ["DMD_TeacherPairs", "DMD_Distill", "DMD_ContinueRun"]
const HEIGHT = 84 // of the widget, in pixels: three lines, its padding and the node's margin
const ADVANCED_HEIGHT = 120

const NAME = "dmd_summary"

function textLine() {
  const line = document.createElement("div")
  line.className = "dmd-summary"
  line.style.cssText =
    "box-sizing: border-box; height: 100%; overflow: auto; padding: 4px 8px; border-radius: 6px;" +
    "font: 12px/18px sans-serif; color: var(--input-text, #ddd); user-select: text;" +
    "background: var(--comfy-input-bg, #222); white-space: pre-line; overflow-wrap: anywhere"
  return line
}

app.registerExtension({
  name: "dmdonestep.summary",

  setup() {
    const last = new Map() // prompt id -> what its nodes said last
    listen(({ node, id, prompt, text }) => {
      if (!text) return
      last.set(`${prompt}/${id}`, text)
      node?.widgets.find(({ name }) => name === NAME)?.options.setValue(text)
    })
    app.api.addEventListener("execution_interrupted", ({ detail }) => {
      const said = last.get(`${detail.prompt_id}/${detail.node_id}`)
      if (!SAVES_WHEN_STOPPED.includes(detail.node_type) || !said) return
      const detailed = { severity: "info", summary: "Stopped", detail: said }
      app.extensionManager.toast.add({ ...detailed, life: 10000 })
    })
  },

  loadedGraphNode(node) {
    const { text } = recall(node)
    if (text) node.widgets?.find(({ name }) => name === NAME)?.options.setValue(text)
  },

  nodeCreated(node) {
    const placeholder = BEFORE_THE_FIRST_RUN[node.comfyClass]
    if (!placeholder) return
    const line = textLine()
    const show = (text, known) => {
      line.textContent = text // never as HTML: a file's metadata is anybody's words
      line.style.opacity = known ? 1 : 0.5
    }
    show(placeholder, false)
    // There from the start, so that no node grows over its neighbour when it runs.
    const widget = node.addDOMWidget(NAME, "dmd_summary", line, {
      serialize: false, // not in what is sent to /prompt
      hideOnZoom: false,
      getValue: () => line.textContent,
      setValue: (text) => show(text, true),
      getMinHeight: () => HEIGHT,
      getMaxHeight: () => HEIGHT,
    })
    widget.serialize = false // nor in the workflow's file

    // Else it takes all the room that the node keeps for its picture.
    const advanced = node.widgets.find(({ name }) => name === "advanced")
    if (advanced) advanced.options.getMaxHeight = () => ADVANCED_HEIGHT
  },
})
