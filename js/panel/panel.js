// The panel of a run: its pictures over time, its curves, its numbers and its settings.
// It draws report.html and the panel on our nodes alike. What it is given is data; every text of it
// becomes a text node, never HTML: a name, a setting or a file may be anybody's words.

const COLOURS = ["#4e9af1", "#f2a03d", "#49b06e", "#d96fd0", "#e15759"]
const GRID = "#8885" // on dark and light alike
const CHART_HEIGHT = 170
const LINEAR = "learning rate" // a chart with nothing to see in its decades
const MEASURES = {
  nfe: "network evaluations",
  frechet_distance: "Fréchet distance to the data",
  intra_class_std_ratio: "intra-class std ratio",
  ms_per_image_batch_1: "ms an image, batch 1",
  ms_per_image_batch_64: "ms an image, batch 64",
}

/** An element with these properties and children; strings become text nodes. */
function make(tag, properties = {}, ...children) {
  const { aria = {}, ...own } = properties
  const made = Object.assign(document.createElement(tag), own)
  for (const [name, value] of Object.entries(aria)) made.setAttribute(`aria-${name}`, value)
  made.append(...children)
  return made
}

/** 125 -> "2:05", 4000 -> "1:06:40". */
function duration(seconds) {
  const whole = Math.round(seconds)
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60]
  const shown = parts[0] ? parts : parts.slice(1)
  return shown.map((part, i) => (i ? String(part).padStart(2, "0") : part)).join(":")
}

const short = (value) => (value === null || value === undefined ? "" : Number(value.toPrecision(3)))

/** What a run has come to, in a line. */
export function progress({ step, steps, time }, saysLeft = true) {
  const said = [`step ${step} of ${steps}`]
  if (time.a_step) said.push(`${short(time.a_step)} s a step`)
  if (time.seconds) said.push(`${duration(time.seconds)} of training`)
  if (saysLeft && time.a_step && step < steps)
    said.push(`${duration((steps - step) * time.a_step)} left`)
  return said.join(" · ")
}

function table(head, rows) {
  const cells = (tag, row) => make("tr", {}, ...row.map((cell) => make(tag, {}, String(cell))))
  return make(
    "table",
    {},
    make("thead", {}, cells("th", head)),
    make("tbody", {}, ...rows.map((row) => cells("td", row))),
  )
}

/** Settings, and where each comes from. */
export function settingsTable(settings) {
  const rows = settings.map(({ key, value, source }) => [key, value, source])
  return table(["setting", "value", "source"], rows)
}

/** The sheet of pictures, with a slider over the steps at which they were drawn. */
class Pictures {
  constructor() {
    this.picture = make("img", { className: "dmd-picture", draggable: false })
    this.slider = make("input", { type: "range", min: 0, value: 0, aria: { label: "picture" } })
    this.said = make("output")
    this.element = make(
      "figure",
      {},
      make("div", { className: "dmd-slider" }, this.slider, this.said),
      this.picture,
    )
    this.slider.addEventListener("input", () => this.draw())
    this.pictures = []
  }

  show(pictures, drawn) {
    const last = this.pictures.length - 1
    const follows = last < 0 || +this.slider.value === last
    const step = this.pictures[this.slider.value]?.step
    this.pictures = pictures
    this.drawn = drawn
    this.element.hidden = !pictures.length
    this.slider.max = Math.max(0, pictures.length - 1)
    const same = pictures.findIndex((picture) => picture.step === step)
    this.slider.value = follows || same < 0 ? pictures.length - 1 : same
    if (pictures.length) this.draw()
  }

  draw() {
    const { step, src } = this.pictures[this.slider.value]
    const most = this.pictures.length
    const thinned = this.drawn > most ? `, thinned from ${this.drawn}: the rest is in samples/` : ""
    this.said.textContent = `step ${step} (picture ${+this.slider.value + 1} of ${most}${thinned})`
    this.slider.setAttribute("aria-valuetext", `step ${step}`)
    if (this.picture.getAttribute("src") !== src) this.picture.src = src
    this.picture.alt = `teacher, student and gradient at step ${step}`
  }
}

/** Charts below each other over one axis of steps: the pointer reads, a drag zooms all of them. */
class Curves {
  constructor(uPlot) {
    this.uPlot = uPlot
    this.charts = []
    this.key = ""
    this.isLog = true
    this.sync = uPlot.sync(`dmd-${Math.random()}`)
    const button = (text, pressed, act) =>
      make("button", { type: "button", textContent: text, onclick: act, aria: pressed })
    this.log = button("log scale", { pressed: true }, () => this.toggle())
    const whole = button("whole run", {}, () => this.look(null))
    const hint = "drag to zoom; keys: + − ← → 0"
    this.box = make("div", {
      className: "dmd-charts",
      tabIndex: 0,
      role: "group",
      aria: { label: "curves. Plus and minus zoom, arrows move, 0 shows the whole run" },
    })
    this.said = make("span", { className: "dmd-hint" })
    this.element = make(
      "div",
      { className: "dmd-curves" },
      make("div", { className: "dmd-bar" }, this.log, whole, make("span", { textContent: hint })),
      this.box,
      this.said,
    )
    this.box.addEventListener("keydown", (event) => this.press(event))
    this.resized = new ResizeObserver(() => this.resize())
    this.resized.observe(this.box)
  }

  show({ steps, lines }, thinned) {
    this.steps = steps
    this.lines = lines
    this.said.textContent = thinned
      ? `${thinned} steps: of each few the least and the greatest value are drawn`
      : ""
    const key = lines.map(({ chart, label }) => `${chart}/${label}`).join("|")
    if (key !== this.key) {
      this.key = key
      this.build()
      return
    }
    const seen = this.seen
    for (const chart of this.charts) chart.plot.setData(this.columns(chart.lines), !seen)
    if (seen) this.look(seen)
  }

  /** The steps that are zoomed to; null for the whole run. */
  get seen() {
    const [chart] = this.charts
    const shown = chart?.plot.scales.x
    if (!shown || shown.min === null || !chart.plot.data[0].length) return null
    const [first, last] = [chart.plot.data[0][0], chart.plot.data[0].at(-1)]
    return shown.min > first || shown.max < last ? [shown.min, shown.max] : null
  }

  columns(indices) {
    const drawable = (value) => (this.isLog && value <= 0 ? null : value)
    return [this.steps, ...indices.map((i) => this.lines[i].values.map(drawable))]
  }

  build() {
    const seen = this.seen
    for (const { plot } of this.charts) plot.destroy()
    this.box.replaceChildren()
    const named = new Map()
    for (const [i, { chart }] of this.lines.entries())
      named.set(chart, [...(named.get(chart) ?? []), i])
    this.charts = [...named].map(([title, indices]) => ({
      lines: indices,
      plot: this.chart(title, indices),
    }))
    if (seen) this.look(seen)
  }

  chart(title, indices) {
    const ink = () => getComputedStyle(this.box).color
    const line = { stroke: GRID, width: 1 }
    const decades = (_, ticks) => ticks.map((tick) => (Number.isInteger(Math.log10(tick)) ? tick : null))
    const isLog = this.isLog && title !== LINEAR
    const grid = isLog ? { ...line, filter: decades } : line
    const axis = { stroke: ink, grid: line, ticks: line, size: 30 }
    const range = (_, least, greatest) =>
      least === null ? [0.1, 1] : this.uPlot.rangeLog(least, greatest, 10, false)
    const options = {
      title,
      width: Math.max(200, this.box.clientWidth),
      height: CHART_HEIGHT,
      scales: { x: { time: false }, y: isLog ? { distr: 3, range } : {} },
      axes: [axis, { ...axis, grid, ticks: grid, size: 64, values: (_, ticks) => ticks.map(short) }],
      cursor: {
        sync: { key: this.sync.key },
        // a node's canvas is zoomed: what the pointer says is in pixels of the screen
        move: (chart, left, top) => {
          const scale = chart.over.getBoundingClientRect().width / chart.over.offsetWidth
          return chart.cursor.event && scale ? [left / scale, top / scale] : [left, top]
        },
      },
      series: [
        { label: "step" },
        ...indices.map((index, i) => ({
          label: this.lines[index].label,
          stroke: COLOURS[i % COLOURS.length],
          width: 1,
          value: (_, value) => short(value) ?? "",
          points: { show: this.steps.length < 2 },
          spanGaps: false,
        })),
      ],
    }
    return new this.uPlot(options, this.columns(indices), this.box)
  }

  resize() {
    const width = Math.max(200, this.box.clientWidth)
    for (const { plot } of this.charts)
      if (plot.width !== width) plot.setSize({ width, height: CHART_HEIGHT })
  }

  toggle() {
    this.isLog = !this.isLog
    this.log.setAttribute("aria-pressed", this.isLog)
    this.build()
  }

  /** Zoom to [first, last]; null: the whole run. */
  look(steps) {
    if (!this.steps?.length) return
    const [min, max] = steps ?? [this.steps[0], this.steps.at(-1)]
    for (const { plot } of this.charts) plot.setScale("x", { min, max })
  }

  press(event) {
    const [first, last] = [this.steps?.[0] ?? 0, this.steps?.at(-1) ?? 0]
    const [min, max] = this.seen ?? [first, last]
    const [middle, half] = [(min + max) / 2, (max - min) / 2]
    const zoomed = (factor) => {
      const wide = Math.max(1, half * factor)
      return [Math.max(first, middle - wide), Math.min(last, middle + wide)]
    }
    const moved = (by) => {
      const way = by < 0 ? Math.max(by, first - min) : Math.min(by, last - max)
      return [min + way, max + way]
    }
    const acts = {
      "+": () => zoomed(0.5),
      "=": () => zoomed(0.5),
      "-": () => zoomed(2),
      ArrowLeft: () => moved(-half / 2),
      ArrowRight: () => moved(half / 2),
      0: () => null,
    }
    if (!(event.key in acts) || event.ctrlKey || event.metaKey || event.altKey) return
    this.look(acts[event.key]())
    event.preventDefault()
    event.stopPropagation()
  }

  close() {
    this.resized.disconnect()
    for (const { plot } of this.charts) plot.destroy()
  }
}

export class Panel {
  /** uPlot: the chart library. compact: one part at a time, behind tabs, as a node has room for.
   *  more: parts by name, elements of the caller's. */
  constructor(root, uPlot, { compact = false, more = {} } = {}) {
    this.compact = compact
    this.title = make("h1")
    this.about = make("p", { className: "dmd-about" })
    this.progress = make("p", { className: "dmd-progress" })
    this.pictures = new Pictures()
    this.curves = new Curves(uPlot)
    this.numbers = make("div", { className: "dmd-numbers" })
    this.settings = make("div", { className: "dmd-settings" })
    const parts = {
      Pictures: this.pictures.element,
      Curves: this.curves.element,
      Settings: make("div", {}, this.numbers, this.settings),
      ...more,
    }
    this.element = make("div", { className: `dmd-panel ${compact ? "dmd-compact" : ""}` })
    if (compact) this.element.append(...this.tabs(parts), this.progress)
    else {
      const part = (name, ...elements) => make("section", {}, make("h2", {}, name), ...elements)
      const left = [part("Pictures", parts.Pictures), part("Numbers", this.numbers)]
      this.element.append(
        make("header", {}, this.title, this.about, this.progress),
        make(
          "main",
          {},
          make("div", {}, ...left),
          make("div", {}, part("Curves", parts.Curves)),
        ),
        part("Settings, and where each comes from", this.settings),
      )
    }
    root.append(this.element)
  }

  tabs(parts) {
    const tabs = Object.keys(parts).map((name) =>
      make("button", { type: "button", role: "tab", textContent: name }),
    )
    const choose = (chosen) => {
      for (const tab of tabs) {
        tab.setAttribute("aria-selected", tab === chosen)
        tab.tabIndex = tab === chosen ? 0 : -1
        parts[tab.textContent].parentElement.hidden = tab !== chosen
      }
    }
    const bar = make("div", { className: "dmd-tabs", role: "tablist" }, ...tabs)
    const boxes = Object.values(parts).map((part) =>
      make("div", { className: "dmd-part", role: "tabpanel" }, part),
    )
    bar.addEventListener("click", ({ target }) => tabs.includes(target) && choose(target))
    bar.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key]
      if (!way) return
      const next = tabs.at((tabs.indexOf(document.activeElement) + way) % tabs.length)
      choose(next)
      next.focus()
      event.stopPropagation()
    })
    this.choose = (name) => choose(tabs.find((tab) => tab.textContent === name))
    choose(tabs[0])
    return [bar, ...boxes]
  }

  /** Draw this state of a run: what dmd_train/run/report.py describes. */
  show(data) {
    this.title.textContent = data.name
    this.about.textContent = `${data.preset}: ${data.about}`
    this.progress.textContent = progress(data, !this.compact) // a node's own line says what is left
    this.pictures.show(data.pictures, data.pictures_drawn)
    this.curves.show(data.curves, data.thinned)
    const told = JSON.stringify([data.samplers, data.facts, data.settings])
    if (told === this.told) return
    this.told = told
    const { teacher, student } = data.samplers
    const measured = Object.entries(MEASURES).filter(([key]) => teacher && key in teacher)
    const rows = measured.map(([key, name]) => {
      const [many, one] = [teacher[key], student[key]]
      const faster = key.startsWith("ms") ? `${short(many / one)}x` : ""
      return [name, short(many), short(one), faster]
    })
    this.numbers.replaceChildren(
      ...(teacher ? [table(["", "teacher", "student", "speed-up"], rows)] : []),
      ...Object.entries(data.facts).map(([name, said]) => make("p", {}, `${name}: ${said}`)),
    )
    this.settings.replaceChildren(settingsTable(data.settings))
  }

  close() {
    this.curves.close()
    this.element.remove()
  }
}
