// The panel of a run on DMD Distill and DMD Continue Run: the same that report.html shows.
// It asks the server for the run by its name, at most once a second and only while it is seen, so that
// it shows a run that goes on elsewhere, too.

import { app } from "../../scripts/app.js"
import { Panel, progress, settingsTable } from "./panel/panel.js"
import uPlot from "./panel/uplot/uPlot.esm.js"
import { listen, recall } from "./said.js"

const OF_A_RUN = ["DMD_Distill", "DMD_ContinueRun"]
const BEGINS_RUNS = "DMD_Distill"
const NEXT = "Next run"
const PLANNED = ["preset", "steps", "resolution", "guidance", "rank", "seed", "advanced"]
PLANNED.push("file", "ckpt_name", "unet_name") // the loader's
const NAME = "dmd_panel"
const STYLES = ["./panel/uplot/uPlot.min.css", "./panel/panel.css"]
const HEIGHT = 210 // at least, in pixels: a sheet of three rows below its slider
const SECOND = 1000
const SELDOM = 5 // seconds between two looks at a run that does not change

const panels = new WeakMap() // node -> its RunPanel

/** The node that loads what is wired into `model`, LoRAs and patches passed over. */
function loaderOf(node) {
  for (let hops = 0; node && hops < 50; hops++) {
    const slot = node.inputs?.findIndex(({ name }) => name === "model") ?? -1
    if (slot < 0) return node
    node = node.getInputNode(slot)
  }
}

function stylesheet(file) {
  const link = document.createElement("link")
  return Object.assign(link, { rel: "stylesheet", href: new URL(file, import.meta.url).href })
}

class RunPanel {
  constructor(node) {
    this.node = node
    this.box = document.createElement("div")
    // what is in it scrolls: else Nodes 2.0 would make the node as high as all three charts
    this.box.style.cssText = `position: relative; height: 100%; min-height: ${HEIGHT}px`
    this.box.append(...STYLES.map(stylesheet)) // in what is ours: the page's head is everybody's
    this.next = document.createElement("div")
    const more = node.comfyClass === BEGINS_RUNS ? { [NEXT]: this.next } : {}
    this.panel = new Panel(this.box, uPlot, { compact: true, more })
    this.forget()
    // a drag on a chart zooms it; it moves no node
    this.box.addEventListener("pointerdown", (event) => event.stopPropagation())
    this.unchanged = 0
    this.timer = setInterval(() => this.look(), SECOND)
  }

  /** The run that is shown: the one that the node names, else the one that it said it is at. */
  get run() {
    const named = this.node.widgets?.find(({ name }) => name === "run")?.value
    return String(named || this.said || recall(this.node).run || "")
  }

  /** There is no run to show, or not yet: only what the next one would be. */
  forget() {
    if (this.panel.choose && this.node.comfyClass === BEGINS_RUNS) this.panel.choose(NEXT)
    else this.panel.element.hidden = true
  }

  look() {
    if (document.hidden || !this.box.checkVisibility()) return
    if (this.node.comfyClass === BEGINS_RUNS) this.lookAhead()
    this.lookAtRun()
  }

  /** The number behind every 0, whenever a widget has another value than at the last look. */
  async lookAhead() {
    const loader = loaderOf(this.node)
    const widgets = [...this.node.widgets, ...(loader?.widgets ?? [])]
    const told = widgets.filter(({ name }) => PLANNED.includes(name))
    const query = new URLSearchParams(told.map(({ name, value }) => [name, String(value)])).toString()
    if (query === this.query) return
    this.query = query
    const answer = await app.api.fetchApi(`/dmd-one-step/planned?${query}`).catch(() => null)
    if (query !== this.query) return
    if (answer?.status === 200) this.next.replaceChildren(settingsTable((await answer.json()).settings))
    else if (answer?.status === 422) this.next.textContent = (await answer.json()).error
    else this.query = undefined // the server is away: ask again
  }

  async lookAtRun() {
    const { run } = this
    if (!run || this.asking) return
    const isAnother = run !== this.shown
    if (!isAnother && this.unchanged && ++this.unchanged % SELDOM) return
    this.asking = true
    try {
      const path = `/dmd-one-step/runs/${encodeURIComponent(run)}`
      const seen = isAnother ? "" : (this.version ?? "")
      const answer = await app.api.fetchApi(`${path}?seen=${encodeURIComponent(seen)}`)
      if (answer.status !== 200) {
        this.unchanged ||= 1
        if (isAnother) this.forget()
        this.shown = run
        return
      }
      this.unchanged = 0
      const data = await answer.json()
      for (const picture of data.pictures) {
        const file = `step-${String(picture.step).padStart(8, "0")}.png`
        picture.src = app.api.apiURL(`${path}/${file}`)
      }
      this.panel.element.hidden = false
      this.panel.show(data)
      if (isAnother) this.panel.choose("Pictures")
      ;[this.shown, this.version] = [run, data.version]
      this.box.title = `${data.name}: ${progress(data, false)}`
    } catch {
      this.unchanged = 1 // the server is away: ask again soon
    } finally {
      this.asking = false
    }
  }

  close() {
    clearInterval(this.timer)
    this.panel.close()
  }
}

app.registerExtension({
  name: "dmdonestep.runpanel",

  setup() {
    listen(({ node, run }) => {
      const panel = panels.get(node)
      if (!panel) return
      panel.said = run ?? panel.said
      panel.unchanged = 0
    })
  },

  nodeCreated(node) {
    if (!OF_A_RUN.includes(node.comfyClass)) return
    const panel = new RunPanel(node)
    panels.set(node, panel)
    const widget = node.addDOMWidget(NAME, NAME, panel.box, {
      serialize: false,
      hideOnZoom: false,
      getValue: () => "",
      setValue: () => {},
      getMinHeight: () => HEIGHT,
    })
    widget.serialize = false
    const { onRemoved } = node
    node.onRemoved = function () {
      panel.close()
      onRemoved?.apply(this, arguments)
    }
  },
})
