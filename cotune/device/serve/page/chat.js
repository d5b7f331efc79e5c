// The chat page: wires the message field, the conversation and the panel to the service.

import { addProblem, addUser, Answer, noCounts, Tip } from "./conversation.js";
import { getJson, onKeyWanted, setKey, streamChat } from "./events.js";
import { bytes, chosen, fillSegments, showLedger, showMetrics, showShares } from "./panel.js";

const $ = (id) => document.getElementById(id);
const log = $("log"), prompt = $("prompt"), send = $("send"), stop = $("stop"), announcer = $("announcer");
const welcome = $("welcome");

const NOTES = {
  correction: "The device sends a small correction and the cloud decides. Probabilities stay in the cloud.",
  token: "The cloud sends its likeliest tokens and the device decides. Probabilities are shown.",
};
const LEDGER_EVERY_MS = 1000;
// Base logits for each token in the token form: enough to pin most probabilities down.
const TOP_K = 256;

let info = null;
let messages = [];
let running = null; // AbortController of the answer that is being written

new Tip(log, $("tip"), announcer);

// The token, where the service asks for one.
let keyAsked = null;
onKeyWanted((wasTried) => {
  keyAsked ??= new Promise((resolve) => {
    $("key-error").textContent = wasTried ? "That token is not accepted." : "";
    $("key-dialog").showModal();
    $("key-dialog").addEventListener("close", () => { keyAsked = null; resolve($("key-dialog").returnValue === "ok"); }, { once: true });
  });
  return keyAsked;
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  $("key").value = "";
  $("key-dialog").close("ok");
});

// Settings and details: a sheet on a phone, a column beside the conversation elsewhere.
function openDetails(isOpen) {
  $("details").classList.toggle("open", isOpen);
  $("backdrop").hidden = !isOpen;
  $("details-toggle").setAttribute("aria-expanded", String(isOpen));
  (isOpen ? $("details-close") : $("details-toggle")).focus();
}
$("details-toggle").addEventListener("click", () => openDetails(true));
$("details-close").addEventListener("click", () => openDetails(false));
$("backdrop").addEventListener("click", () => openDetails(false));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && $("details").classList.contains("open")) openDetails(false);
});
document.querySelector('[data-setting="answer"]').addEventListener("change", () => {
  $("setting-note").textContent = NOTES[chosen("answer")];
});

// The message field grows with its text.
function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  send.disabled = !info || !prompt.value.trim();
}
prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
$("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
stop.addEventListener("click", () => running?.abort());

function submit() {
  const text = prompt.value.trim();
  if (!text || running || !info) return;
  prompt.value = "";
  fit();
  welcome.hidden = true;
  addUser(log, text);
  messages.push({ role: "user", content: text });
  answer();
}

$("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  log.replaceChildren(welcome);
  welcome.hidden = false;
  showMetrics(null);
  showShares(noCounts());
  prompt.focus();
});

function wishes() {
  const form = chosen("answer");
  const number = (id) => ($(id).value === "" || !$(id).checkValidity() ? undefined : Number($(id).value));
  return {
    mode: chosen("mode"),
    schedule: chosen("schedule"),
    answer: form,
    temperature: number("temperature"),
    seed: number("seed"),
    max_tokens: number("max-tokens"),
    top_k: form === "token" ? TOP_K : undefined,
  };
}

// Keeps the end in sight, unless the reader has scrolled away from it.
function following() {
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  return () => { if (isAtEnd) log.scrollTop = log.scrollHeight; };
}

function setRunning(controller) {
  running = controller;
  send.hidden = Boolean(controller);
  stop.hidden = !controller;
}

async function answer() {
  const controller = new AbortController();
  const cotune = wishes();
  const mine = messages;
  const shown = new Answer(log, cotune.answer);
  log.scrollTop = log.scrollHeight;
  setRunning(controller);
  showMetrics(null);
  showShares(shown.counts);
  const ledger = setInterval(refreshLedger, LEDGER_EVERY_MS);
  let metrics = null, told = null, problem = null, reason = null;
  try {
    const sent = $("earlier").checked ? mine : mine.slice(-1);
    for await (const chunk of streamChat({ model: info.model, messages: sent, cotune }, controller.signal)) {
      const follow = following();
      const choice = chunk.choices[0];
      reason = choice?.finish_reason ?? reason;
      metrics = chunk.cotune?.metrics ?? metrics;
      if (chunk.cotune?.so_far) told = chunk.cotune.so_far;
      if (chunk.cotune?.who) showReach(chunk.cotune.who === "local");
      if (choice?.delta?.content || chunk.cotune?.who) shown.add(choice.delta.content ?? "", chunk.cotune);
      showMetrics(metrics ?? told);
      showShares(shown.counts);
      follow();
    }
  } catch (error) {
    if (error.name !== "AbortError") problem = error;
  } finally {
    clearInterval(ledger);
  }
  const follow = following();
  const isStopped = controller.signal.aborted;
  shown.end(note(metrics ?? told, shown, { isStopped, reason }));
  if (running === controller) setRunning(null);
  if (mine !== messages) return; // another conversation has begun
  if (problem) {
    if (!shown.content) shown.turn.remove();
    addProblem(log, problem.message, () => { shown.turn.remove(); answer(); });
  } else {
    messages.push({ role: "assistant", content: shown.content });
    announcer.textContent = isStopped ? "Stopped." : shown.content;
  }
  follow();
  refreshLedger();
  setTimeout(refreshLedger, LEDGER_EVERY_MS); // what ends a stopped text leaves a moment later
  prompt.focus({ preventScroll: true });
}

function note(values, shown, { isStopped, reason }) {
  const count = Object.values(shown.counts).reduce((sum, n) => sum + n, 0);
  if (!values || !count) return isStopped ? "Stopped." : "";
  const parts = [
    `${count} tokens`, `M ${values.M.toFixed(2)}`, `${values.ms_per_token.toFixed(1)} ms per token`,
    `${bytes(values.bytes_up)} sent`,
  ];
  if (shown.counts.local && info.plugin) parts.push(`${shown.counts.local} of them by this device alone`);
  if (isStopped) parts.push("stopped");
  else if (reason === "length") parts.push("cut at the token limit");
  return parts.join(" · ");
}

// Whether the cloud is out of reach, where there should be one.
function showReach(isAway) {
  $("reach").hidden = !(isAway && info.plugin);
}

async function refreshLedger() {
  try {
    showLedger(await getJson("/cotune/ledger"));
  } catch {
    // The answer itself tells what is wrong.
  }
}

async function start() {
  try {
    info = await getJson("/cotune/info");
  } catch (problem) {
    addProblem(log, problem.message, start);
    return;
  }
  const { defaults } = info;
  const there = { plugin: info.plugin, offline: info.offline, alone: !info.plugin };
  for (const place of document.querySelectorAll("[data-needs]")) place.hidden = !there[place.dataset.needs];
  showReach(Boolean(info.offline?.is_away));
  const partner = info.plugin ? info.cloud && `with ${info.cloud.model}` : "on this device";
  $("model").textContent = [info.model, partner].filter(Boolean).join(" ");
  document.title = `${info.model} · cotune`;
  fillSegments("mode", info.modes, defaults.mode);
  fillSegments("schedule", info.schedules, defaults.schedule);
  fillSegments("answer", info.answers, defaults.answer);
  $("setting-note").textContent = NOTES[defaults.answer] ?? "";
  $("temperature").value = defaults.temperature;
  $("seed").value = defaults.seed;
  $("max-tokens").value = defaults.max_tokens;
  const about = [
    info.plugin && `${info.plugin.num_parameters.toLocaleString("en")} private parameters.`,
    info.offline && `The offline model has ${info.offline.bits} bits a weight and room for ${info.offline.context} tokens.`,
    `cotune ${info.version}.`,
  ];
  $("about").textContent = about.filter(Boolean).join(" ");
  fit();
  await refreshLedger();
  document.documentElement.dataset.ready = "true";
  prompt.focus({ preventScroll: true });
}

start();
