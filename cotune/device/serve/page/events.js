// Talks to the service: JSON answers, and server-sent events as they come.

export class Problem extends Error {
  constructor(message, { code = null, status = 0, retryAfter = null } = {}) {
    super(message);
    this.code = code;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

let askForKey = async () => false;

// `ask` shows a way to enter the token and resolves to true when there is one to try.
export function onKeyWanted(ask) { askForKey = ask; }

// The token lives as long as the tab.
export function setKey(key) { sessionStorage.setItem("cotune-key", key); }

async function request(path, options = {}) {
  const key = sessionStorage.getItem("cotune-key");
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The cotune service on this device does not answer. Is `cotune device serve` still running?");
  }
  if (response.status === 401 && await askForKey(Boolean(key))) return request(path, options);
  if (!response.ok) throw await problemOf(response);
  return response;
}

async function problemOf(response) {
  const retryAfter = response.headers.get("retry-after");
  try {
    const { error } = await response.json();
    return new Problem(error.message, { code: error.code, status: response.status, retryAfter });
  } catch {
    return new Problem(`The service answered with status ${response.status}.`, { status: response.status });
  }
}

export async function getJson(path) { return (await request(path)).json(); }

// Yields the chunks of a streamed completion.
export async function* streamChat(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Problem("The answer broke off before its end.");
      waiting += value;
      const events = waiting.split("\n\n");
      waiting = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Problem(chunk.error.message, { code: chunk.error.code });
        yield chunk;
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new Problem("The connection to the service on this device broke off.");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}
