// A prompt box, and the picture as it appears.

import { element, events, get, onSubmit, say } from "./api.js";

const form = document.querySelector("#picture-form");
const figure = document.querySelector("#picture");

export async function refresh() {
  const models = (await get("/v1/models")).data.map((model) => element("option", model.id));
  const chosen = form.elements.model.value;
  form.elements.model.replaceChildren(...models);
  if (chosen) form.elements.model.value = chosen;
  const adapters = await get("/adapters");
  const box = document.querySelector("#adapters");
  const before = new Set(chosenAdapters().map((adapter) => adapter.name));
  box.replaceChildren(...adapters.map((adapter) => row(adapter.name, before.has(adapter.name))));
  if (!adapters.length) box.textContent = "none yet: a training makes one";
}

function row(name, isChosen) {
  const line = element("div", "", { class: "adapter" });
  const label = element("label", ` ${name}`);
  const box = element("input", "", { type: "checkbox", value: name });
  box.checked = isChosen;
  const slider = element("input", "", {
    type: "range", min: 0, max: 2, step: 0.05, value: 1, "aria-label": `strength of ${name}`,
  });
  const number = element("output", "1");
  slider.addEventListener("input", () => { number.textContent = slider.value; });
  label.prepend(box);
  line.append(label, slider, number);
  return line;
}

function chosenAdapters() {
  return [...document.querySelectorAll(".adapter")]
    .filter((line) => line.querySelector("[type=checkbox]").checked)
    .map((line) => ({
      name: line.querySelector("[type=checkbox]").value,
      strength: Number(line.querySelector("[type=range]").value),
    }));
}

onSubmit(form, async (request) => {
  say("making the picture");
  const body = JSON.stringify({ ...request, adapters: chosenAdapters(), stream: true, partial_images: 3 });
  for await (const { event, data } of events("/v1/images/generations", { method: "POST", body })) {
    if (event === "error") throw new Error(data.detail);
    const isWhole = event.endsWith("completed");
    figure.hidden = false;
    figure.querySelector("img").src = `data:image/${data.output_format};base64,${data.b64_json}`;
    figure.querySelector("img").alt = request.prompt;
    figure.querySelector("figcaption").textContent = isWhole ? `seed ${data.seed}, ${data.size}` : "…";
    if (isWhole) say("the picture is made");
  }
});
