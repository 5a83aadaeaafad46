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

// Where a request goes and its body: with a picture it is a form, as OpenAI's API has it.
function asked({ image, mask, strength, ...request }) {
  const body = { ...request, adapters: chosenAdapters(), stream: true, partial_images: 3 };
  if (!image) return ["/v1/images/generations", JSON.stringify(body)];
  const sent = new FormData();
  for (const [key, value] of Object.entries({ ...body, adapters: JSON.stringify(body.adapters) })) sent.set(key, value);
  if (strength !== undefined) sent.set("strength", strength);
  for (const [key, files] of Object.entries({ image, mask })) if (files) sent.set(key, files[0]);
  return ["/v1/images/edits", sent];
}

onSubmit(form, async (request) => {
  say("making the picture");
  const [path, body] = asked(request);
  for await (const { event, data } of events(path, { method: "POST", body })) {
    if (event === "error") throw new Error(data.detail);
    appear(data, request.prompt, event.endsWith("completed"));
  }
});

function appear(data, prompt, isWhole) {
  const source = `data:image/${data.output_format};base64,${data.b64_json}`;
  figure.hidden = false;
  figure.querySelector("img").src = source;
  figure.querySelector("img").alt = prompt;
  figure.querySelector("figcaption").textContent = isWhole ? `seed ${data.seed}, ${data.size}` : "…";
  const link = figure.querySelector("a");
  link.hidden = !isWhole;
  if (!isWhole) return;
  link.href = source;
  link.download = `picture-${data.seed}.${data.output_format}`;
  say("the picture is made");
}
