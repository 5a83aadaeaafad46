// Jobs, and one of them as it goes: its loss, its sample pictures, its log.

import { attempt, element, events, get, onSubmit, say, send, show } from "./api.js";

const list = document.querySelector("#jobs");
const panel = document.querySelector("#job");
const form = document.querySelector("#train-form");
let watched = null; // the id of the job that is shown

export async function refresh() {
  const [jobs, sets] = [await get("/jobs"), await get("/datasets")];
  const ready = sets.filter((set) => set.has_config).map((set) => element("option", set.name));
  const chosen = form.elements.output_name.value;
  form.elements.output_name.replaceChildren(...ready);
  if (chosen) form.elements.output_name.value = chosen;
  list.replaceChildren(...jobs.map(line));
}

function line(job) {
  const item = element("li");
  const percent = `${Math.round(100 * job.progress)} %`;
  const button = element("button", `${job.kind} ${job.name} · ${job.state} · ${percent}`, { type: "button" });
  if (job.id === watched) button.setAttribute("aria-current", "true");
  button.addEventListener("click", () => attempt(button, () => open(job.id)));
  item.append(button);
  return item;
}

async function open(id) {
  watched = id;
  panel.hidden = false;
  panel.dataset.id = id;
  panel.querySelector("h3").textContent = id;
  panel.querySelector(".samples").replaceChildren();
  watch(id).catch((error) => say(error.message, true));
  await refresh();
}

async function watch(id) {
  const losses = new Map();
  draw(losses);
  for await (const { event, data } of events(`/jobs/${id}/events`)) {
    if (watched !== id) return; // another is shown by now
    if (event === "state") await state(id, data);
    if (event === "step" && data.event === "update") step(losses, data);
    if (event === "preview") await sample(data.url);
  }
  await state(id, await get(`/jobs/${id}`));
  await refresh();
}

async function state(id, job) {
  panel.dataset.state = job.state;
  panel.querySelector("progress").value = job.progress;
  const loss = job.loss === null ? "" : `, loss ${job.loss.toFixed(4)}`;
  panel.querySelector(".numbers").textContent = `${job.state}${loss} ${job.message}`;
  panel.querySelector("[name=cancel]").hidden = !["queued", "running"].includes(job.state);
  panel.querySelector("[name=resume]").hidden = !["failed", "cancelled"].includes(job.state);
  panel.querySelector("pre").textContent = (await get(`/jobs/${id}`)).logs.join("\n");
}

function step(losses, data) {
  losses.set(data.iteration, data.loss);
  panel.querySelector("progress").value = data.iteration / data.iterations;
  const place = `iteration ${data.iteration} of ${data.iterations}`;
  panel.querySelector(".numbers").textContent = `running, ${place}, loss ${data.loss.toFixed(4)}`;
  draw(losses);
}

function draw(losses) {
  const values = [...losses].sort(([a], [b]) => a - b).map(([, loss]) => loss);
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const points = values.map((loss, i) => {
    const x = 400 * i / Math.max(1, values.length - 1);
    const y = 110 - 100 * (loss - least) / (most - least || 1);
    return `${x.toFixed(1)},${y.toFixed(1)}`;
  });
  panel.querySelector("polyline").setAttribute("points", points.join(" "));
}

async function sample(url) {
  const image = element("img", "", { alt: `sample ${url.split("/").pop()}`, loading: "lazy" });
  panel.querySelector(".samples").prepend(image);
  await show(image, url);
}

for (const name of ["cancel", "resume"]) {
  const button = panel.querySelector(`[name=${name}]`);
  button.addEventListener("click", () => attempt(button, async () => {
    await send(`/jobs/${watched}/${name}`);
    await open(watched);
  }));
}

onSubmit(form, async (request) => {
  const { run_id: id, notes } = await send("/train", request);
  say(["the training is in the queue", ...notes].join("; "));
  await open(id);
});
