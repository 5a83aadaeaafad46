// The server's API: every request has the token, every refusal becomes one sentence.

const TOKEN = "flux-token";

export async function api(path, options = {}) {
  const headers = { ...options.headers };
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.Authorization = `Bearer ${token}`;
  if (options.body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401 && await login()) return api(path, options);
  if (!answer.ok) {
    const text = await answer.json().catch(() => ({ detail: `the server answered ${answer.status}` }));
    throw new Error(text.detail);
  }
  return answer;
}

export const get = async (path) => (await api(path)).json();
export const send = async (path, body, method = "POST") =>
  (await api(path, { method, body: JSON.stringify(body ?? {}) })).json();

let asking = null; // one dialog for all requests that need the token

function login() {
  asking ??= new Promise((done) => {
    const dialog = document.querySelector("#login");
    dialog.addEventListener("close", () => {
      asking = null;
      const token = dialog.querySelector("input").value;
      sessionStorage.setItem(TOKEN, token);
      done(Boolean(token));
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

// Server-sent events of a request, as {event, data}. EventSource could send no token and no body.
export async function* events(path, options) {
  const reader = (await api(path, options)).body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      const whole = text.split("\n\n");
      text = whole.pop();
      for (const part of whole) {
        const lines = Object.fromEntries(part.split("\n").map((line) => line.split(/: (.*)/s)));
        if (lines.data) yield { event: lines.event, data: JSON.parse(lines.data) };
      }
    }
  } finally {
    reader.cancel();
  }
}

// An image whose request has the token, too.
export async function show(image, path) {
  const blob = await (await api(path)).blob();
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
}

export function say(text, isFault = false) {
  const line = document.querySelector("#message");
  line.textContent = text;
  line.classList.toggle("fault", isFault);
}

// Runs what a form or a button asks for: its button waits, and what goes wrong is said.
export async function attempt(button, work) {
  button.disabled = true;
  try {
    say("");
    await work();
  } catch (error) {
    say(error.message, true);
  } finally {
    button.disabled = false;
  }
}

export function onSubmit(form, work) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(form.querySelector("button"), () => work(values(form)));
  });
}

// What is filled in of a form; numbers as numbers.
function values(form) {
  const found = {};
  for (const field of form.elements) {
    if (field.name && field.value && !field.closest("fieldset fieldset, #adapters")) {
      found[field.name] = field.type === "number" ? Number(field.value) : field.value;
    }
  }
  return found;
}

export function element(name, text = "", attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
