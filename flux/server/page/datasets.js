// Datasets: pictures with captions that can be corrected.

import { attempt, element, get, onSubmit, say, send, show } from "./api.js";

const list = document.querySelector("#sets");
const panel = document.querySelector("#set");
let opened = null; // the name of the dataset that is shown

export async function refresh() {
  const sets = await get("/datasets");
  list.replaceChildren(...sets.map((set) => {
    const item = element("li");
    const config = set.has_config ? "with data.toml" : "no data.toml";
    const text = `${set.name} · ${set.captioned} of ${set.pictures} captioned · ${config}`;
    const button = element("button", text, { type: "button" });
    if (set.name === opened) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => attempt(button, () => open(set.name)));
    item.append(button);
    return item;
  }));
}

async function open(name) {
  opened = name;
  const { pictures } = await get(`/datasets/${encodeURIComponent(name)}`);
  panel.hidden = false;
  panel.querySelector("h3").textContent = name;
  panel.querySelector(".cards").replaceChildren(...pictures.map((picture) => card(name, picture)));
  await refresh();
}

function card(name, picture) {
  const made = element("div");
  const image = element("img", "", { alt: picture.caption ?? picture.name });
  show(image, picture.url).catch((error) => say(error.message, true));
  const text = element("textarea", picture.caption ?? "", { rows: 4, "aria-label": `caption of ${picture.name}` });
  const button = element("button", "Save", { type: "button" });
  const file = picture.name.split("/").map(encodeURIComponent).join("/");
  button.addEventListener("click", () => attempt(button, async () => {
    const path = `/datasets/${encodeURIComponent(name)}/captions/${file}`;
    text.value = (await send(path, { caption: text.value }, "PUT")).caption;
    say(`the caption of ${picture.name} is saved`);
    await refresh();
  }));
  made.append(image, text, button);
  return made;
}

onSubmit(document.querySelector("#download-form"), async ({ output_name, urls }) => {
  say("downloading");
  const answer = await send("/download-images", { output_name, urls: urls.split(/\s+/).filter(Boolean) });
  const faults = Object.entries(answer.files).filter(([, text]) => text.startsWith("Error: "));
  say(faults.map(([url, text]) => `${url}: ${text}`).join("; ") || answer.message, faults.length > 0);
  if (faults.length < Object.keys(answer.files).length) await open(output_name);
});

onSubmit(document.querySelector("#caption-form"), async (request) => {
  say("captioning");
  const answer = await send("/caption-images", { ...request, output_name: opened });
  say(answer.message);
  await open(opened);
});

onSubmit(document.querySelector("#config-form"), async (request) => {
  const trigger = document.querySelector("#caption-form").elements.trigger_word.value;
  const answer = await send("/create-dataset-config", { ...request, output_name: opened, trigger_word: trigger });
  say(`${answer.message}: ${answer.path}`);
  await refresh();
});
