// The panel beside the conversation: what this answer costs, how to write, and what has left the device.

import { bar, element } from "./conversation.js";

const KINDS = {
  open: "Requests, with their prompts",
  correct: "Corrections",
  ack: "Agreements",
  object: "Tokens of its own",
  draft: "Drafts",
  more: "Questions for more logits",
  hello: "Greetings",
  close: "Ends of texts",
  "features request": "Texts to tune on",
  "asset request": "Requests for public files",
};

export function bytes(count) {
  if (count < 1000) return `${count} B`;
  if (count < 1e6) return `${(count / 1e3).toFixed(count < 1e4 ? 1 : 0)} kB`;
  return `${(count / 1e6).toFixed(1)} MB`;
}

const SHOWN = {
  M: (value) => value.toFixed(2),
  ms_per_token: (value) => (value < 100 ? value.toFixed(1) : String(Math.round(value))),
  bytes_up: bytes,
  bytes_down: bytes,
};

export function showMetrics(values, root = document) {
  for (const place of root.querySelectorAll("[data-metric]")) {
    const value = values?.[place.dataset.metric];
    place.textContent = value === undefined ? "–" : SHOWN[place.dataset.metric](value);
  }
}

export function showShares(counts) {
  const total = Object.values(counts).reduce((sum, count) => sum + count, 0);
  const { late, ...own } = counts;
  const shares = { ...own, cloud: own.cloud + late };
  const chart = document.getElementById("shares");
  let begin = 0;
  const words = [];
  for (const [who, count] of Object.entries(shares)) {
    const width = total ? (100 * count) / total : 0;
    const rect = chart.querySelector(`.${who}`);
    rect.setAttribute("x", String(begin));
    rect.setAttribute("width", String(width));
    begin += width;
    const share = total ? `${Math.round(width)} %` : "–";
    document.querySelector(`[data-share="${who}"]`).textContent = share;
    words.push(`${who} ${share}`);
  }
  chart.setAttribute("aria-label", total ? words.join(", ") : "Nothing written yet");
}

export function showLedger({ kinds, bytes: total }) {
  document.getElementById("ledger-total").textContent = bytes(total);
  const rows = Object.entries(kinds).sort((a, b) => b[1].bytes - a[1].bytes);
  const most = rows.length ? rows[0][1].bytes : 1;
  document.getElementById("ledger").replaceChildren(...rows.map(([kind, { count, bytes: size }]) => {
    const row = element("li");
    row.dataset.kind = kind;
    row.append(
      element("span", "", KINDS[kind] ?? kind),
      element("span", "size", `${count.toLocaleString("en")} × · ${bytes(size)}`),
      bar(size / most, "share"),
    );
    return row;
  }));
}

// Radio buttons for one setting.
export function fillSegments(name, choices, chosen) {
  const fieldset = document.querySelector(`[data-setting="${name}"]`);
  fieldset.querySelector("div").replaceChildren(...choices.map((choice) => {
    const label = element("label");
    const input = element("input");
    Object.assign(input, { type: "radio", name, value: choice, checked: choice === chosen });
    label.append(input, element("span", "", choice));
    return label;
  }));
  fieldset.hidden = choices.length === 0;
}

export function chosen(name) {
  return document.querySelector(`[data-setting="${name}"] input:checked`)?.value;
}
