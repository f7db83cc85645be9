// What our nodes say: to the workflow and the node that they were queued from, and to no other.
// Several workflows may be open in a page, each with a node 1, and ComfyUI's own events name the node
// alone. So ours name the workflow, too; what is said to one that is not open is kept for when it is.

import { app } from "../../scripts/app.js"

const KEPT = "dmd-one-step.said" // in localStorage: it outlives a reload and a restart
const MOST = 200 // nodes that are remembered
const ON_A_NODE = "dmd-one-step.said"

const root = () => app.rootGraph ?? app.graph

/** The node of an id as the server has it: "5", or "3:5" for node 5 in the subgraph of node 3. */
function nodeOf(id) {
  let [graph, node] = [root(), null]
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(+part)
    graph = node?.subgraph
  }
  return node
}

function remembered() {
  try {
    return new Map(JSON.parse(localStorage.getItem(KEPT)))
  } catch {
    return new Map()
  }
}

function remember(workflow, id, said) {
  const all = remembered()
  const key = `${workflow}/${id}`
  const before = all.get(key)
  all.delete(key) // the newest are the last
  all.set(key, { ...before, ...said })
  try {
    localStorage.setItem(KEPT, JSON.stringify([...all].slice(-MOST)))
  } catch {
    // full, or not allowed: then nothing outlives the page
  }
}

/** What a node of the open workflow said last: {text, run}, or an empty object. */
export function recall(node) {
  return (node.graph === root() && remembered().get(`${root().id}/${node.id}`)) || {}
}

const workflows = new Map() // prompt id -> a promise of its workflow's id

/** The workflow that a prompt was queued from: running, or done. Nothing where no page sent one. */
function workflowOf(prompt) {
  if (!workflows.has(prompt)) workflows.set(prompt, askedFor(prompt).catch(() => undefined))
  return workflows.get(prompt)
}

async function askedFor(prompt) {
  const asked = (path) => app.api.fetchApi(path).then((answer) => answer.json())
  const { queue_running: running } = await asked("/queue")
  let item = running.find(([, id]) => id === prompt)
  item ??= (await asked(`/history/${prompt}`))[prompt]?.prompt
  return item?.[3]?.extra_pnginfo?.workflow?.id
}

const hearers = []

/** Call `hear` with what any of our nodes says; its `node` is there where its workflow is open. */
export function listen(hear) {
  hearers.push(hear)
}

function heard({ workflow, id, prompt, text, run }) {
  if (!workflow) return
  const said = { ...(text && { text }), ...(run && { run }) }
  remember(workflow, id, said)
  const node = workflow === root().id ? nodeOf(id) : null
  for (const hear of hearers) hear({ node, id, prompt, ...said })
}

app.registerExtension({
  name: "dmdonestep.said",

  setup() {
    app.api.addEventListener(ON_A_NODE, ({ detail: { node, prompt_id, ...said } }) => {
      workflows.set(prompt_id, Promise.resolve(said.workflow))
      heard({ ...said, id: node, prompt: prompt_id })
    })
    app.api.addEventListener("execution_start", ({ detail }) => workflowOf(detail.prompt_id))
    // what came of it, from a cache too: ComfyUI's own event, which names no workflow
    app.api.addEventListener("executed", async ({ detail }) => {
      const { text, run } = detail.output ?? {}
      if (!text) return
      const said = { text: [text].flat().join("\n"), run: run?.[0] }
      const workflow = await workflowOf(detail.prompt_id)
      heard({ ...said, workflow, id: detail.display_node ?? detail.node, prompt: detail.prompt_id })
    })
  },
})
