/**
 * The first page: one form, one picture. Speaks only the public HTTP API, and reads the answer of
 * POST /v1/images/generations as server-sent events through fetch, so that an API key can go in a
 * header and closing the page (or "Stop") withdraws the job.
 */

import { $, Refused, call, events, keepKey, watchReadiness } from "/page/server.js";

const PREVIEWS = 8;
const SHELF_LENGTH = 8;

let running = null; // AbortController of the request on its way
let asking = null; // and of the question about the picture
let models = [];

// ---------------------------------------------------------------- models

async function loadModels() {
  try {
    const list = await (await call("/v1/models")).json();
    models = list.data.filter((model) => model.tasks.includes("text-to-image"));
    $("ask").hidden = !list.data.some((model) => model.tasks.includes("image-to-text"));
    $("key-box").hidden = !$("key").value;
    fillSelect($("model"), models.map((model) => [model.id, model.id]));
    sizesOfModel();
    fail(null);
  } catch (error) {
    if (error.status === 401) askForKey(error);
    else fail(error.message);
  }
}

function askForKey(error) {
  $("key-box").hidden = false;
  if ($("key").value) fail(error.message);
}

function fillSelect(select, options) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
}

function sizesOfModel() {
  const model = models.find((one) => one.id === $("model").value);
  const sizes = model?.sizes?.length ? model.sizes : ["auto"];
  fillSelect($("size"), sizes.map((size) => [size, size.replace("x", " × ")]));
  if (model?.default_size) $("size").value = model.default_size;
}

// ---------------------------------------------------------------- painting

function order() {
  const wanted = {
    model: $("model").value,
    prompt: $("prompt").value,
    negative_prompt: $("negative").value,
    size: $("size").value,
    stream: true,
    partial_images: PREVIEWS,
    response_format: "b64_json",
  };
  if ($("seed").value) wanted.seed = Number($("seed").value);
  if ($("steps").value) wanted.steps = Number($("steps").value);
  if ($("guidance").value) wanted.guidance_scale = Number($("guidance").value);
  return wanted;
}

function post(body, { signal }) {
  const headers = { "Content-Type": "application/json" };
  return { method: "POST", headers, body: JSON.stringify(body), signal };
}

async function paint() {
  running = new AbortController();
  busy(true);
  try {
    const answer = await call("/v1/images/generations", post(order(), running));
    for await (const event of events(answer.body)) show(event);
  } catch (error) {
    if (error.status === 401) askForKey(error);
    stopped(error);
  } finally {
    running = null;
    busy(false);
  }
}

function show(event) {
  if (event.error) throw new Refused(event.error.status, event);
  if (event.type === "image_generation.progress") progress(event);
  if (event.type === "image_generation.partial_image") picture(event, "painting");
  if (event.type === "image_generation.completed") finished(event);
}

function progress({ step, total_steps: total, progress: done }) {
  $("progress").value = done;
  $("step").textContent = total ? `step ${step} of ${total}` : "waiting";
}

function picture({ b64_json: bytes, output_format: format }, state) {
  const image = $("picture");
  image.src = `data:image/${format};base64,${bytes}`;
  image.alt = $("prompt").value;
  image.hidden = false;
  $("empty").hidden = true;
  $("canvas").dataset.state = state;
}

function finished(event) {
  picture(event, "done");
  $("step").textContent = `done in ${event.seconds.toFixed(1)} s`;
  $("use-seed").textContent = event.seed;
  $("download").href = $("picture").src;
  $("download").download = `gesso-${event.seed}.${event.output_format}`;
  provenance(event.metadata);
  suggestions(event.metadata);
  $("made").hidden = false;
  $("answer").textContent = "";
  shelve($("picture").src, $("prompt").value);
}

function provenance({ suggestions: _, in_domain: __, versions = {}, ...facts }) {
  const rows = { ...facts, ...versions };
  $("provenance").replaceChildren(
    ...Object.entries(rows).flatMap(([name, value]) => {
      const term = document.createElement("dt");
      const text = document.createElement("dd");
      term.textContent = name.replaceAll("_", " ");
      text.textContent = value;
      return [term, text];
    }),
  );
}

function suggestions({ in_domain: known, suggestions: ideas = [] }) {
  $("suggestions").hidden = known !== false || !ideas.length;
  $("suggestions").querySelector("ul").replaceChildren(
    ...ideas.map((idea) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = idea;
      button.addEventListener("click", () => {
        $("prompt").value = idea;
        $("form").requestSubmit();
      });
      item.append(button);
      return item;
    }),
  );
}

function shelve(source, prompt) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const image = new Image();
  button.type = "button";
  button.title = prompt;
  image.src = source;
  image.alt = prompt;
  button.append(image);
  button.addEventListener("click", () => {
    asking?.abort();
    $("picture").src = source;
    $("answer").textContent = "";
  });
  item.append(button);
  $("shelf").prepend(item);
  if ($("shelf").children.length > SHELF_LENGTH) $("shelf").lastChild.remove();
}

// ---------------------------------------------------------------- asking about the picture

async function ask() {
  asking?.abort();
  const mine = (asking = new AbortController());
  const text = $("question").value.trim() || $("question").placeholder;
  const content = [
    { type: "image_url", image_url: { url: $("picture").src } },
    { type: "text", text },
  ];
  $("answer").textContent = "…";
  try {
    const body = { messages: [{ role: "user", content }], stream: true };
    const answer = await call("/v1/chat/completions", post(body, mine));
    let said = "";
    for await (const chunk of events(answer.body)) {
      if (chunk.error) throw new Refused(chunk.status, chunk);
      said += chunk.choices[0]?.delta.content ?? "";
      $("answer").textContent = said || "…";
    }
  } catch (error) {
    if (error.name !== "AbortError") $("answer").textContent = error.message;
  }
}

// ---------------------------------------------------------------- what is shown when

function busy(yes) {
  $("generate").disabled = yes;
  $("cancel").hidden = !yes;
  $("progress").hidden = !yes;
  if (!yes) return;
  fail(null);
  asking?.abort();
  $("suggestions").hidden = true;
  $("made").hidden = true;
  $("progress").value = 0;
  $("step").textContent = "waiting";
  $("canvas").scrollIntoView({ block: "nearest", behavior: "smooth" });
}

function stopped(error) {
  const withdrawn = error.name === "AbortError";
  $("step").textContent = withdrawn ? "stopped" : "";
  if (!withdrawn) fail(error.message);
}

function fail(sentence) {
  $("error").hidden = !sentence;
  $("error").textContent = sentence ?? "";
}

// ---------------------------------------------------------------- wiring

keepKey(loadModels);
$("model").addEventListener("change", sizesOfModel);
$("use-seed").addEventListener("click", () => { $("seed").value = $("use-seed").textContent; });
$("cancel").addEventListener("click", () => running?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) paint();
});

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});

watchReadiness();
loadModels();
