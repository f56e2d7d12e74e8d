/**
 * What every page needs of the server: calls with the key of the person, streams of events, and
 * whether it is ready. A page has the elements #key, #key-box and #status.
 */

const KEY_STORAGE = "gesso-api-key";

export const $ = (id) => document.getElementById(id);

// ---------------------------------------------------------------- talking to the gateway

function headers(extra = {}) {
  const key = $("key").value.trim();
  return key ? { ...extra, Authorization: `Bearer ${key}` } : extra;
}

export class Refused extends Error {
  constructor(status, problem) {
    super(problem?.error?.message ?? `The server answered ${status}.`);
    this.status = status;
  }
}

export async function call(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: headers(options.headers) }).catch(unreached);
  if (!answer.ok) throw new Refused(answer.status, await answer.json().catch(() => null));
  return answer;
}

/** Browsers only say that fetching failed. */
function unreached(error) {
  if (error.name === "AbortError") throw error;
  throw new Error("The server does not answer; try again when it is back.");
}

/** Yields the data of every event in a text/event-stream body; comments are heartbeats. */
export async function* events(body) {
  let rest = "";
  for await (const text of chunks(body.pipeThrough(new TextDecoderStream()))) {
    const blocks = (rest + text).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5)).join("\n").trim();
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

/** Streams are not async iterable in every browser yet. */
async function* chunks(stream) {
  const reader = stream.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

// ---------------------------------------------------------------- the server's state

function status(state, text) {
  $("status").dataset.state = state;
  $("status").textContent = text;
}

export async function watchReadiness() {
  try {
    const answer = await fetch("/health/ready");
    const health = await answer.json();
    if (answer.ok) return status("ready", "ready");
    const missing = Object.entries(health.services ?? {}).filter(([, one]) => !one.ready);
    status("waiting", `warming up: ${missing.map(([name]) => name).join(", ") || "broker"}`);
  } catch {
    status("waiting", "the server does not answer");
  }
  setTimeout(watchReadiness, 2000);
}

/** Keeps the key for this tab, and calls `changed` when the person enters another one. */
export function keepKey(changed) {
  $("key").value = sessionStorage.getItem(KEY_STORAGE) ?? "";
  $("key").addEventListener("change", () => {
    sessionStorage.setItem(KEY_STORAGE, $("key").value.trim());
    changed();
  });
}
