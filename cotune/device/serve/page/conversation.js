// Turns on the page: what was asked, the answer token by token, and what each token says of itself.

const WHO = {
  cloud: "The cloud decided alone",
  agreed: "The device agreed",
  changed: "The device changed it",
  late: "The device answered too late",
  local: "The device wrote it alone",
};

const tokens = new WeakMap(); // element -> what its chunk said

export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

// A bar that fills `share` (0 to 1) of its width.
export function bar(share, className = "bar") {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", className);
  svg.setAttribute("viewBox", "0 0 100 4");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const rect = document.createElementNS(SVG, "rect");
  rect.setAttribute("width", String(100 * share));
  rect.setAttribute("height", "4");
  svg.append(rect);
  return svg;
}

export function addUser(log, text) {
  const turn = element("article", "turn user");
  turn.setAttribute("aria-label", "You");
  turn.append(element("p", "", text));
  log.append(turn);
}

// Who decided how many tokens of an answer: nobody any yet.
export function noCounts() {
  return Object.fromEntries(Object.keys(WHO).map((who) => [who, 0]));
}

// An answer that grows.
export class Answer {
  constructor(log, answerForm) {
    this.form = answerForm;
    this.content = "";
    this.counts = noCounts();
    this.turn = element("article", "turn assistant");
    this.turn.setAttribute("aria-label", "Answer");
    this.turn.setAttribute("aria-busy", "true");
    this.text = element("div", "text waiting");
    this.text.tabIndex = 0;
    this.text.setAttribute("role", "group");
    this.text.setAttribute("aria-label", "Answer; the arrow keys go from token to token");
    this.meta = element("p", "meta");
    this.turn.append(this.text, this.meta);
    log.append(this.turn);
  }

  add(text, told) {
    this.content += text;
    if (!told) {
      this.text.append(text);
      return;
    }
    this.counts[told.who] += 1;
    if (!text) return;
    const token = element("span", `token ${told.who}`, text);
    tokens.set(token, { ...told, form: this.form });
    this.text.append(token);
  }

  end(note) {
    this.turn.setAttribute("aria-busy", "false");
    this.text.classList.remove("waiting");
    this.meta.textContent = note;
    if (!this.content) this.text.remove();
  }
}

export function addProblem(log, message, onRetry) {
  const turn = element("section", "turn problem");
  turn.setAttribute("role", "alert");
  turn.append(element("p", "", message));
  if (onRetry) {
    const again = element("button", "", "Try again");
    again.type = "button";
    again.addEventListener("click", () => { turn.remove(); onRetry(); });
    turn.append(again);
  }
  log.append(turn);
}

function percent(share) {
  if (share > 0 && share < 0.01) return "under 1 %";
  if (share < 1 && share > 0.99) return "over 99 %";
  return `${Math.round(100 * share)} %`;
}

function describeProbability({ probability, probability_bounds: bounds, form, who }) {
  if (probability !== null) return { text: `Probability ${percent(probability)}`, share: probability };
  if (bounds) {
    return { text: `Probability between ${percent(bounds[0])} and ${percent(bounds[1])}`, share: bounds[0] };
  }
  if (who === "local") return { text: "Probability not known: the cloud was out of reach." };
  if (form !== "token") return { text: "Probability not known here: the cloud decides in the correction form." };
  return { text: who === "cloud" ? "Probability not known: the device was not asked." : "Probability not known." };
}

// Shows what a token says of itself, on hover, on tap, and by the arrow keys.
export class Tip {
  constructor(log, tip, announcer) {
    this.tip = tip;
    this.announcer = announcer;
    this.chosen = null;
    this.isHeld = false;
    log.addEventListener("pointerover", (event) => {
      if (event.pointerType !== "touch" && tokens.has(event.target)) this.show(event.target, false);
    });
    log.addEventListener("pointerout", (event) => {
      if (event.pointerType !== "touch" && !this.isHeld && event.target === this.chosen) this.hide();
    });
    document.addEventListener("click", (event) => {
      const isToken = tokens.has(event.target);
      if (isToken && !(this.isHeld && this.chosen === event.target)) this.show(event.target, true);
      else this.hide();
    });
    log.addEventListener("keydown", (event) => this.onKey(event));
    log.addEventListener("scroll", () => this.hide(), { passive: true });
    log.addEventListener("focusout", () => this.hide());
  }

  onKey(event) {
    const text = event.target.closest?.(".text");
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") this.hide();
    if (!text || !step) return;
    event.preventDefault();
    const all = [...text.querySelectorAll(".token")];
    const at = all.indexOf(this.chosen);
    const next = all[at < 0 ? (step > 0 ? 0 : all.length - 1) : Math.min(all.length - 1, Math.max(0, at + step))];
    if (!next) return;
    this.show(next, true);
    this.announcer.textContent = `${next.textContent}: ${this.tip.textContent}`;
  }

  show(token, isHeld) {
    this.hide();
    const told = tokens.get(token);
    const { text, share } = describeProbability(told);
    const title = element("b", told.who, WHO[told.who]);
    const parts = [title];
    if (told.base_text) parts.push(element("p", "", `The cloud alone: “${told.base_text.trim() || told.base_text}”`));
    if (share !== undefined) parts.push(bar(share, `bar ${told.who}`));
    parts.push(element("p", "faint", text), element("p", "faint", `Token ${told.position + 1}`));
    this.tip.replaceChildren(...parts);
    this.tip.hidden = false;
    const place = token.getClientRects()[0];
    const { width, height } = this.tip.getBoundingClientRect();
    const left = Math.min(window.innerWidth - width - 12, Math.max(12, place.left + place.width / 2 - width / 2));
    const above = place.top - height - 8;
    this.tip.style.left = `${left}px`;
    this.tip.style.top = `${above > 8 ? above : place.bottom + 8}px`;
    token.classList.add("chosen");
    this.chosen = token;
    this.isHeld = isHeld;
  }

  hide() {
    this.chosen?.classList.remove("chosen");
    this.chosen = null;
    this.isHeld = false;
    this.tip.hidden = true;
  }
}
