// The page's state: one question at a time, which can be stopped; the options; the address, which holds the question.

import { ask, info, readiness } from "./api.js";
import { renderDraft, renderError, renderResult } from "./view.js";

const EXAMPLES = ["How many people live in Paris?", "What is the capital of Kenya?", "What is the symbol of gold?", "Which language is spoken in Brazil?", "How many people live in Narnia?"];
const POLL_MS = 5000;

const find = (id) => document.getElementById(id);
const form = find("form");
const { question, strategy, n_docs, num_beams, num_return_sequences, min_probability, api_key } = form.elements;
let running = null; // AbortController of the request in flight

function requestBody() {
  const body = { question: question.value, num_beams: Number(num_beams.value) || 1, provenance: "token" };
  const answers = Number(num_return_sequences.value) || 1;
  if (answers > 1) body.num_return_sequences = answers;
  if (strategy.value) body.strategy = strategy.value;
  if (n_docs.value) body.n_docs = Number(n_docs.value);
  if (Number(min_probability.value) > 0) body.min_probability = Number(min_probability.value);
  return body;
}

function asCurl(body) {
  const url = new URL("v1/answer", location.href).href;
  const json = JSON.stringify(body).replaceAll("'", "'\\''");
  const key = api_key.value ? ' -H "Authorization: Bearer $RAG_API_KEY"' : "";
  return `curl ${url} -H 'Content-Type: application/json'${key} -d '${json}'`;
}

function setBusy(busy) {
  find("busy").hidden = !busy;
  find("stage").textContent = "Retrieving …";
  find("submit").textContent = busy ? "Stop" : "Ask";
  find("result").setAttribute("aria-busy", String(busy));
}

// For those who hear the page: the answer, not every passage.
function announce(text) {
  find("announcement").textContent = text;
}

async function submit() {
  if (!question.value.trim()) {
    question.focus();
    return;
  }
  const body = requestBody();
  const controller = (running = new AbortController());
  const began = performance.now();
  find("error").replaceChildren();
  announce("Retrieving and reading");
  setBusy(true);
  history.replaceState(null, "", `?q=${encodeURIComponent(body.question)}`);
  try {
    let write;
    for await (const [event, data] of ask(body, api_key.value, controller.signal)) {
      if (event === "documents") {
        const draft = renderDraft(body.question, data.documents);
        write = draft.write;
        find("result").replaceChildren(draft.fragment);
        find("stage").textContent = "Reading …";
      } else if (event === "token") {
        write(data.text);
      } else if (event === "answer") {
        const context = { curl: asCurl(body), elapsed: performance.now() - began, threshold: body.min_probability ?? 0 };
        find("result").replaceChildren(renderResult(data, context));
        announce(`Answer: ${find("result").querySelector("h2").textContent}`);
      }
    }
  } catch (error) {
    find("result").replaceChildren();
    announce(""); // the error is an alert, which announces itself
    if (error.name !== "AbortError") find("error").replaceChildren(renderError(error, submit));
    if (error.param && form.elements[error.param] && error.param !== "question") find("options").open = true;
  } finally {
    running = null;
    setBusy(false);
    showReadiness();
  }
}

const stop = () => running?.abort();

async function showReadiness() {
  const { status, reasons } = await readiness();
  const pill = find("status");
  const text = { ok: "ready", unreachable: "not reachable" }[status] ?? "not ready";
  if (pill.textContent !== text) pill.textContent = text; // not announced again while it stays the same
  pill.dataset.state = status;
  pill.title = reasons.join("\n");
}

// Limits of this service bound the inputs; without them the service itself still refuses what it cannot do.
async function showInfo() {
  const about = await info(api_key.value).catch(() => null);
  if (!about) return;
  const bounds = { n_docs: about.limits.max_n_docs, num_beams: about.limits.max_beams, num_return_sequences: about.limits.max_answers };
  for (const [name, bound] of Object.entries(bounds)) if (bound) form.elements[name].max = bound;
  find("about").textContent = `generator ${about.version} on ${about.device}`;
}

function showExamples() {
  const items = EXAMPLES.map((text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "chip";
    button.textContent = text;
    button.addEventListener("click", () => {
      stop();
      question.value = text;
      submit();
    });
    const item = document.createElement("li");
    item.append(button);
    return item;
  });
  find("examples").replaceChildren(...items);
}

// Private windows may refuse storage: then the choice lasts as long as the page.
const theme = {
  get kept() {
    try {
      return localStorage.getItem("theme");
    } catch {
      return null;
    }
  },
  keep(name) {
    document.documentElement.dataset.theme = name;
    try {
      localStorage.setItem("theme", name);
    } catch {
      // not kept
    }
  },
};

function setUpTheme() {
  const { dataset } = document.documentElement;
  if (theme.kept) dataset.theme = theme.kept;
  find("theme").addEventListener("click", () => {
    const dark = dataset.theme ? dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    theme.keep(dark ? "light" : "dark");
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) stop();
  else submit();
});
num_return_sequences.addEventListener("change", () => {
  num_beams.value = Math.max(Number(num_beams.value) || 1, Number(num_return_sequences.value) || 1);
});
min_probability.addEventListener("input", () => {
  const share = Number(min_probability.value);
  find("threshold").textContent = share > 0 ? `${Math.round(100 * share)} %` : "off";
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "/" && !event.target.matches("input[type=text], input[type=password]")) {
    event.preventDefault();
    question.select();
  }
});

api_key.addEventListener("change", showInfo);

setUpTheme();
showExamples();
showReadiness();
showInfo();
setInterval(() => document.hidden || showReadiness(), POLL_MS);
const shared = new URLSearchParams(location.search).get("q");
if (shared) {
  question.value = shared;
  submit();
}
