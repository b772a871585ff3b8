// Turns responses into elements. Text only ever enters the page as text, never as markup.

const COLOURS = 6; // of the parts of the timing bar, see style.css

function fill(templateId) {
  const fragment = document.getElementById(templateId).content.cloneNode(true);
  const slot = (name) => fragment.querySelector(`[data-slot="${name}"]`);
  return { fragment, slot };
}

function percent(share) {
  if (share > 0 && share < 0.001) return "< 0.1 %";
  if (share < 1 && share > 0.999) return "> 99.9 %";
  return `${(100 * share).toFixed(1)} %`;
}

const milliseconds = (ms) => (ms < 10 ? `${ms.toFixed(1)} ms` : `${Math.round(ms)} ms`);

// Widths are set through the object model, which a policy without inline styles allows.
function setBar(bar, share) {
  bar.firstElementChild.style.width = `${100 * share}%`;
}

export function renderError(error, onRetry) {
  const { fragment, slot } = fill("error-template");
  slot("title").textContent = error.status === 422 ? "The service refused the question" : "No answer this time";
  slot("message").textContent = error.message;
  const facts = [error.code, error.status && `HTTP ${error.status}`, error.param && `field ${error.param}`, error.requestId && `request ${error.requestId}`];
  slot("detail").textContent = facts.filter(Boolean).join(" · ");
  if (error.retryable) slot("retry").addEventListener("click", onRetry);
  else slot("retry").remove();
  return fragment;
}

// What is known before the answer is: the passages, and the text as far as it is written.
export function renderDraft(question, documents) {
  const { fragment, slot } = fill("result-template");
  slot("question").textContent = question;
  const text = slot("text");
  text.classList.add("draft");
  for (const name of ["probability-row", "note", "tokens-row", "alternatives", "timings", "command"]) slot(name).remove();
  renderPassages(slot("passages"), documents)(null);
  return { fragment, write: (piece) => text.append(piece) };
}

export function renderResult(response, { curl, elapsed, threshold }) {
  const result = response.results[0];
  const { fragment, slot } = fill("result-template");
  slot("question").textContent = result.question;
  const show = renderPassages(slot("passages"), result.documents);
  const bar = fragment.querySelector(".bar.probability");
  const parts = { text: slot("text"), probability: slot("probability"), note: slot("note") };
  const showTokens = renderTokens(slot, show);
  const choose = (answer) => {
    parts.text.textContent = answer.text;
    parts.probability.textContent = percent(answer.probability);
    const unsure = answer === result.answers[0] && answer.probability < 0.5;
    parts.note.textContent = unsure ? "More likely wrong than right: the passages may not hold the answer." : "";
    setBar(bar, answer.probability);
    show(answer);
    showTokens(answer);
  };
  if (result.answers.length > 0) {
    choose(result.answers[0]);
  } else {
    parts.text.textContent = "I do not know.";
    parts.note.textContent = `No answer reaches a probability of ${Math.round(100 * threshold)} %. These passages came nearest to the question:`;
    slot("probability-row").remove();
    slot("tokens-row").remove();
    show(null);
  }
  renderAlternatives(slot("alternatives"), result.answers, choose);
  renderTimings(slot, response, elapsed);
  const code = slot("curl");
  code.textContent = curl;
  slot("copy").addEventListener("click", async ({ currentTarget: button }) => {
    // A page that comes over plain HTTP from another machine has no clipboard: then it is selected, to be copied.
    getSelection().selectAllChildren(code);
    await navigator.clipboard?.writeText(curl);
    button.textContent = navigator.clipboard ? "Copied" : "Selected";
  });
  return fragment;
}

function renderAlternatives(fieldset, answers, choose) {
  if (answers.length < 2) {
    fieldset.remove();
    return;
  }
  answers.forEach((answer, rank) => {
    const { fragment, slot } = fill("alternative-template");
    const radio = fragment.querySelector("input");
    radio.checked = rank === 0;
    radio.addEventListener("change", () => choose(answer));
    slot("text").textContent = answer.text;
    slot("probability").textContent = percent(answer.probability);
    fieldset.append(fragment);
  });
}

// Returns a function that shows an answer's tokens. The one that is pointed at or has the focus shows its own evidence;
// one of them is in the tab order, and the arrow keys move among them.
function renderTokens(slot, show) {
  const [toolbar, line, given] = [slot("tokens"), slot("token"), slot("given")];
  return (answer) => {
    const whole = () => {
      line.textContent = "\u00a0"; // keeps its height
      given.textContent = "the answer";
      buttons.forEach((button) => button.classList.remove("shown"));
      show(answer);
    };
    const buttons = answer.tokens.map((token, n) => {
      const button = document.createElement("button");
      const share = Math.exp(token.log_prob);
      button.type = "button";
      button.className = "token";
      button.tabIndex = n === 0 ? 0 : -1;
      button.textContent = token.text;
      button.style.setProperty("--sure", `${Math.round(100 * share)}%`);
      const showToken = () => {
        whole();
        button.classList.add("shown");
        line.textContent = `“${token.text.trim()}” has a probability of ${percent(share)}. The bars show how the passages stand after it.`;
        given.textContent = `the answer up to “${token.text.trim()}”`;
        show(answer, token.doc_posterior);
      };
      button.addEventListener("focus", showToken);
      button.addEventListener("blur", whole);
      button.addEventListener("pointerenter", showToken);
      button.addEventListener("pointerleave", () => (toolbar.contains(document.activeElement) ? document.activeElement.dispatchEvent(new Event("focus")) : whole()));
      return button;
    });
    toolbar.onkeydown = (event) => {
      const at = buttons.indexOf(document.activeElement);
      const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: buttons.length - 1 }[event.key];
      if (event.key === "Escape") document.activeElement.blur();
      if (to === undefined || !buttons[to]) return;
      event.preventDefault();
      buttons.forEach((button, n) => (button.tabIndex = n === to ? 0 : -1));
      buttons[to].focus();
    };
    toolbar.replaceChildren(...buttons);
    whole();
  };
}

// Adds the passages to `list`; returns a function that shows the evidence for one answer (null: none was given).
function renderPassages(list, documents) {
  const cards = documents.map((document, n) => {
    const { fragment, slot } = fill("passage-template");
    const card = {
      document,
      item: fragment.querySelector("li"),
      text: slot("text"),
      badge: slot("badge"),
      row: slot("posterior-row"),
      posterior: slot("posterior"),
      bar: fragment.querySelector(".bar.posterior"),
    };
    slot("title").textContent = `${n + 1}. ${document.title || "(no title)"}`;
    slot("score").textContent = `score ${document.score.toFixed(2)}${document.truncated ? " · cut to fit" : ""}`;
    slot("prior").textContent = percent(document.prior);
    setBar(fragment.querySelector(".bar.prior"), document.prior);
    list.append(fragment);
    return card;
  });
  return (answer, posterior = answer?.doc_posterior) => {
    const best = posterior ? posterior.indexOf(Math.max(...posterior)) : -1;
    cards.forEach((card, n) => {
      card.text.replaceChildren(...marked(card.document.text, answer?.text));
      card.item.classList.toggle("best", n === best);
      card.badge.textContent = n === best ? "strongest evidence" : "";
      card.row.hidden = !posterior;
      if (posterior) {
        card.item.dataset.posterior = posterior[n];
        card.posterior.textContent = percent(posterior[n]);
        setBar(card.bar, posterior[n]);
      }
    });
  };
}

// `text` as nodes, with every occurrence of `phrase` as a whole word marked, whatever its case.
function marked(text, phrase) {
  const wanted = phrase?.trim();
  if (!wanted) return [document.createTextNode(text)];
  const escaped = wanted.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const parts = text.split(new RegExp(`(?<![\\p{L}\\p{N}])(${escaped})(?![\\p{L}\\p{N}])`, "giu"));
  return parts.map((part, n) => {
    if (n % 2 === 0) return document.createTextNode(part);
    const mark = document.createElement("mark");
    mark.textContent = part;
    return mark;
  });
}

function renderTimings(slot, { timings_ms: timings, index, model, strategy }, elapsed) {
  const steps = Object.entries(timings).filter(([name]) => name !== "total");
  const sum = steps.reduce((total, [, ms]) => total + ms, 0) || 1;
  slot("took").textContent = `Answered in ${milliseconds(elapsed)} by ${strategy === "token" ? "RAG-Token" : "RAG-Sequence"}`;
  steps.forEach(([name, ms], n) => {
    const part = document.createElement("span");
    part.className = `step-${n % COLOURS}`;
    part.style.width = `${(100 * ms) / sum}%`;
    slot("stack").append(part);
    const term = document.createElement("dt");
    term.className = `step-${n % COLOURS}`;
    term.textContent = name.replaceAll("_", " ");
    const value = document.createElement("dd");
    value.textContent = milliseconds(ms);
    const pair = document.createElement("div");
    pair.append(term, value);
    slot("steps").append(pair);
  });
  slot("index").textContent = [`model ${model}`, index && `collection ${index.collection}, generation ${index.generation}`].filter(Boolean).join(" · ");
}
