// Which part of the page is shown: by the address, so that links and the back button work.

import { say } from "./api.js";
import * as datasets from "./datasets.js";
import * as pictures from "./pictures.js";
import * as runs from "./runs.js";

const PARTS = { pictures, runs, datasets };

async function go() {
  const name = location.hash.slice(1) in PARTS ? location.hash.slice(1) : "pictures";
  for (const part of Object.keys(PARTS)) {
    document.querySelector(`#${part}`).hidden = part !== name;
    document.querySelector(`nav a[href="#${part}"]`).toggleAttribute("aria-current", part === name);
  }
  try {
    await PARTS[name].refresh();
  } catch (error) {
    say(error.message, true);
  }
}

addEventListener("hashchange", go);
go();
