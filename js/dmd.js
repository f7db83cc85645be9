// What a file is and how it samples, in one line on the node that loaded it.
// The nodes say it themselves (`ui={"text": [summary]}`); this only shows it.

import { app } from "../../scripts/app.js"

const LOADERS = ["DMD_LoadCheckpoint", "DMD_LoadLoRA"]
const BEFORE_THE_FIRST_RUN = "Run once to read here what the file is and how it samples."
const HEIGHT = 84 // of the widget, in pixels: three lines, its padding and the node's margin

function textLine() {
  const line = document.createElement("div")
  line.className = "dmd-summary"
  line.style.cssText =
    "box-sizing: border-box; height: 100%; overflow: auto; padding: 4px 8px; border-radius: 6px;" +
    "font: 12px/18px sans-serif; color: var(--input-text, #ddd); user-select: text;" +
    "background: var(--comfy-input-bg, #222)"
  return line
}

app.registerExtension({
  name: "dmdonestep.summary",

  nodeCreated(node) {
    if (!LOADERS.includes(node.comfyClass)) return
    const line = textLine()
    const show = (text, known) => {
      line.textContent = text // never as HTML: a file's metadata is anybody's words
      line.style.opacity = known ? 1 : 0.5
    }
    show(BEFORE_THE_FIRST_RUN, false)
    // There from the start, so that no node grows over its neighbour when it has run.
    const widget = node.addDOMWidget("summary", "dmd_summary", line, {
      serialize: false, // not in what is sent to /prompt
      hideOnZoom: false,
      getMinHeight: () => HEIGHT,
      getMaxHeight: () => HEIGHT,
    })
    widget.serialize = false // nor in the workflow's file

    const { onExecuted } = node
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments)
      if (output?.text) show([output.text].flat().join(" "), true) // null where it came from a cache
    }
  },
})
