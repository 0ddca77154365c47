"use strict";
// The page's whole behaviour. Everything from the index is set as text, never as markup.

const STEPS = ["retrieval", "fetch", "encode", "policy", "compose", "queue", "prefill"];
const FACTS = ["First token", "Then a token", "Context tokens", "Decoder positions", "Positions saved", "Expanded chunks"];
const byId = (id) => document.getElementById(id);
let running = [];

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const number = (value, digits = 0) =>
  Number(value).toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

// --- one answer ------------------------------------------------------------------------------------

class AnswerCard {
  constructor(title) {
    this.text = make("div", { class: "text", "aria-live": "polite", tabindex: "0", role: "region", "aria-label": "Answer" });
    this.status = make("span", { class: "soft status" }, "waiting …");
    this.bar = make("div", { class: "bar", role: "img" });
    this.steps = make("ul", { class: "steps" });
    this.facts = make("dl", { class: "facts" });
    this.passages = make("ol", { class: "passages" });
    this.element = make("section", { class: "answer", "aria-label": title },
      make("h2", {}, title, " ", this.status), this.text, this.bar, this.steps, this.facts, this.passages);
    this.showTimes([...STEPS, "decode"].map((step) => [step, null])); // the places are taken from the first moment on
    this.showFacts(FACTS.map(() => "–"));
  }

  add(piece) {
    this.text.textContent += piece;
  }

  fail(message) {
    this.text.classList.add("error");
    this.text.textContent += message;
    this.status.textContent = "failed";
  }

  showPassages(passages) {
    const ranked = passages.flatMap((passage) => passage.chunks.map((chunk) => chunk.score).filter((s) => s !== null));
    const range = [Math.min(...ranked), Math.max(...ranked)];
    this.passages.replaceChildren(...passages.map((passage) => passageItem(passage, range)));
  }

  showTimes(spent) {
    const total = spent.reduce((sum, [, ms]) => sum + ms, 0) || 1;
    this.bar.replaceChildren(...spent.map(([step, ms], at) => {
      const part = make("span", { class: `s${at}`, title: ms === null ? step : `${step} ${number(ms, 1)} ms` });
      part.style.flexGrow = String(ms / total);
      return part;
    }));
    const said = spent.map(([step, ms]) => (ms === null ? `${step} –` : `${step} ${number(ms, ms < 10 ? 2 : 1)} ms`));
    this.bar.setAttribute("aria-label", `Time by step: ${said.join(", ")}`);
    this.steps.replaceChildren(...said.map((text, at) => make("li", {}, make("i", { class: `s${at}`, "aria-hidden": "true" }), text)));
  }

  showFacts(values) {
    this.facts.replaceChildren(...FACTS.map((term, at) => make("div", {}, make("dt", {}, term), make("dd", {}, values[at]))));
  }

  showStats(stats, told) {
    const decode = stats.ttit_ms * Math.max(0, stats.new_tokens - 1);
    this.showTimes([...STEPS.map((step) => [step, stats[`${step}_ms`] ?? 0]), ["decode", decode]]);
    const slots = stats.compression ? Math.round(stats.context_tokens / stats.compression) : 0;
    this.showFacts([
      `${number(stats.ttft_ms, 1)} ms`, `${number(stats.ttit_ms, 1)} ms`, number(stats.context_tokens),
      number(stats.decoder_positions), number(stats.context_tokens - slots), `${number(stats.num_expanded)} of ${number(stats.num_chunks)}`,
    ]);
    const dropped = told.dropped.length ? `, ${told.dropped.length} passages dropped` : "";
    this.status.textContent = `generation ${told.version}, ${stats.new_tokens} tokens${dropped}`;
  }
}

function passageItem(passage, [lowest, highest]) {
  const saved = passage.chunks.reduce((sum, chunk) => sum + (chunk.expanded ? 0 : chunk.num_tokens - 1), 0);
  const score = passage.score === null ? "given" : `score ${number(passage.score, 3)}`;
  const form = (chunk) => (chunk.expanded ? "expanded" : "compressed");
  const told = (chunk, at) =>
    `chunk ${at + 1}: ${form(chunk)}, ${chunk.num_tokens} tokens` + (chunk.score === null ? "" : `, policy score ${number(chunk.score, 2)}`);
  const strip = make("div", { class: "strip", "aria-hidden": "true" }, ...passage.chunks.map((chunk, at) => {
    const cell = make("span", { class: form(chunk), title: told(chunk, at) });
    const share = chunk.score === null || highest === lowest ? 1 : (chunk.score - lowest) / (highest - lowest);
    cell.style.flexGrow = String(chunk.num_tokens);
    cell.style.height = `${25 + 75 * share}%`;
    return cell;
  }));
  const text = make("p", { class: "chunks" }, ...passage.chunks.map((chunk, at) =>
    make("span", { class: `chunk ${form(chunk)}`, title: told(chunk, at) }, chunk.text)));
  const rows = passage.chunks.map((chunk, at) => make("tr", {},
    ...[at + 1, form(chunk), chunk.num_tokens, chunk.score === null ? "–" : number(chunk.score, 2), chunk.text].map((value) => make("td", {}, String(value)))));
  const head = make("tr", {}, ...["Chunk", "Read as", "Tokens", "Policy score", "Text"].map((name) => make("th", { scope: "col" }, name)));
  const table = make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
  return make("li", {},
    make("h3", {}, `${passage.rank}. ${passage.doc_id} `, make("span", { class: "soft" }, `${score}, ${number(saved)} positions saved`)),
    strip, text, make("details", {}, make("summary", {}, "Chunks as a table"), table));
}

// --- asking ----------------------------------------------------------------------------------------

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function stream(card, body, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const detail = event.refrag;
    if (detail?.passages) card.showPassages(detail.passages);
    if (detail?.stats) card.showStats(detail.stats, detail);
    else if (card.status.textContent === "waiting …") card.status.textContent = "answering …";
    card.add(event.choices[0]?.delta?.content ?? "");
  }
}

async function answer(title, setting) {
  const card = new AnswerCard(title);
  byId("results").append(card.element);
  const abort = new AbortController();
  running.push(abort);
  const filter = byId("filter").value.trim();
  const body = {
    messages: [{ role: "user", content: byId("question").value }], stream: true, include_passages: true, hybrid: false,
    top_k: byId("top-k").valueAsNumber || 5, max_tokens: byId("max-tokens").valueAsNumber || 64, ...setting,
    ...(filter ? { filter } : {}),
  };
  try {
    await stream(card, body, abort.signal);
  } catch (error) {
    if (abort.signal.aborted) card.status.textContent = "stopped";
    else card.fail(error.message);
  }
}

function settingOf(id) {
  const policy = byId(id).querySelector("select").value;
  const fraction = byId(id).querySelector("input[type=number]").valueAsNumber;
  const shared = policy === "all" || policy === "none" || Number.isNaN(fraction);
  return [shared ? policy : `${policy}, ${number(100 * fraction)}% expanded`, shared ? { policy } : { policy, expansion_fraction: fraction }];
}

async function ask() {
  stop();
  if (!byId("question").value.trim()) return;
  byId("results").replaceChildren();
  byId("stop").disabled = false;
  const chosen = [settingOf("settings-a")];
  if (byId("compare").checked) chosen.push(settingOf("settings-b"));
  if (byId("full").checked) chosen.push(["full context", { policy: "all" }]);
  const own = (running = []);
  for (const [title, setting] of chosen) { // one after another: their times are to be compared
    if (own !== running) return;
    await answer(title, setting);
  }
  if (own === running) byId("stop").disabled = true;
}

function stop() {
  for (const abort of running) abort.abort();
  running = [];
  byId("stop").disabled = true;
}

async function greet() {
  const { data: [model] } = await (await fetch("v1/models")).json();
  const about = model.refrag;
  byId("model").textContent = model.id;
  byId("about").textContent =
    `generation ${about.version}, ${number(about.passages)} passages, chunks of ${about.chunk_size} tokens, at most ${number(about.max_positions)} positions`;
  byId("untrained").hidden = about.trained;
  byId("top-k").max = about.max_top_k;
  for (const select of document.querySelectorAll("select[name=policy]")) {
    for (const option of select.options) {
      option.disabled = (option.value !== "all" && !about.compresses) || (option.value === "perplexity" && !about.scored);
    }
    if (!about.compresses || (select.closest("#settings-a") && !about.trained)) select.value = "all";
  }
}

function listen() {
  byId("rest").hidden = false;
  byId("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  byId("stop").addEventListener("click", stop);
  byId("compare").addEventListener("change", (event) => {
    for (const field of byId("settings-b").querySelectorAll("select, input[type=number]")) field.disabled = !event.target.checked;
  });
  byId("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); byId("ask").requestSubmit(); }
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
  byId("question").focus();
}

// --- a page that was written for one answer ---------------------------------------------------------

function show(told) {
  document.title = `${told.question} – refrag`;
  document.querySelector("h1").textContent = told.question;
  byId("about").textContent = `refrag, generation ${told.version} of the index`;
  byId("ask").hidden = true;
  byId("rest").hidden = false;
  byId("untrained").hidden = told.trained;
  const shared = told.policy === "all" || told.policy === "none";
  const card = new AnswerCard(shared ? told.policy : `${told.policy}, ${number(100 * told.expansion_fraction)}% expanded`);
  card.add(told.answer);
  card.showPassages(told.passages);
  card.showStats(told.stats, told);
  byId("results").append(card.element);
}

const data = byId("data");
if (data) show(JSON.parse(data.textContent));
else greet().catch((error) => { byId("about").textContent = `This server cannot be reached: ${error.message}`; }).finally(listen);
