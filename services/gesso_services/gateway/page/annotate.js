/**
 * The annotation page: a picture, clicks and boxes on it, and what the server makes of them. Speaks
 * only the public HTTP API. Clicks are answered at once; words and cars are jobs whose events are
 * followed.
 */

import { $, Refused, call, events, keepKey, watchReadiness } from "/page/server.js";
import { forgetFiles, showFiles, showLabels } from "/page/labels.js";
import { GRAY, colourOf, css } from "/page/masks.js";
import { Stage, carOutlines, corners, signColour } from "/page/stage.js";

const TASKS = { click: "segmentation", text: "text-annotation", cars: "car-annotation" };
const ACCENT = "#2b4c8c";

const stage = new Stage($("stage"), acted);
let file = null; // the picture as it was chosen
let models = [];
let prompt = emptyPrompt(); // of the thing that is being cut out
let kept = []; // masks of the things before it
let marks = []; // what words and cars were marked: {box} or {point}, {input} for words
let asking = null; // AbortController of the click on its way
let job = null; // and of the job

function emptyPrompt() {
  return { box: null, points: [], labels: [] };
}

const mode = () => document.querySelector("input[name=mode]:checked").value;

// ---------------------------------------------------------------- the picture

async function open(chosen) {
  try {
    const picture = await createImageBitmap(chosen, { imageOrientation: "from-image" });
    file = chosen;
    $("frame").style.setProperty("--aspect", picture.width / picture.height);
    $("frame").dataset.state = "shown";
    $("stage").hidden = false;
    $("empty").hidden = true;
    stage.show(picture);
    startAnew();
  } catch {
    $("image").value = ""; // the former picture stays, and it is not this one
    fail(`${chosen.name} is no picture that this browser can show.`);
  }
}

function startAnew() {
  asking?.abort();
  job?.abort();
  prompt = emptyPrompt();
  kept = [];
  marks = [];
  $("not-this").checked = false;
  $("words").replaceChildren();
  $("found").hidden = true;
  $("above-frame").hidden = true;
  $("step").textContent = "";
  stage.clear();
  stage.draw();
  offerActions();
  fail(null);
}

// ---------------------------------------------------------------- what a person does on it

function acted(action) {
  if (mode() === "click") return point(action);
  if ($("found").hidden === false) forgetLabels();
  if (mode() === "text" && !action.box) return stage.draw();
  mark(action);
}

function point({ box, point: at, sign }) {
  if (box) prompt.box = box;
  else {
    prompt.points.push(at);
    prompt.labels.push($("not-this").checked ? 0 : sign);
  }
  cut();
}

function mark(action) {
  const made = action.box ? { box: action.box } : { point: action.point };
  marks.push(made);
  if (mode() === "text") made.input = askForWord(made);
  showMarks();
}

function askForWord(made) {
  const item = document.createElement("li");
  const input = document.createElement("input");
  const remove = document.createElement("button");
  input.placeholder = "what it says";
  input.maxLength = 400;
  input.addEventListener("focus", () => $("found").hidden && showMarks());
  remove.type = "button";
  remove.textContent = "×";
  remove.title = "not a word";
  remove.addEventListener("click", () => unmark(made));
  item.append(input, remove);
  $("words").append(item);
  input.focus();
  return input;
}

function unmark(made) {
  marks = marks.filter((one) => one !== made);
  made.input?.parentElement.remove();
  if ($("found").hidden) showMarks();
  else forgetLabels();
}

function showMarks() {
  stage.outlines = marks
    .filter((made) => made.box)
    .map(({ box, input }) => ({ points: corners(box), colour: ACCENT, dashed: isTyped(input) }));
  stage.dots = marks
    .filter((made) => made.point)
    .map(({ point: at }) => ({ point: at, colour: signColour(1) }));
  stage.draw();
  offerActions();
}

/** The box of the word that is being typed stands out. */
function isTyped(input) {
  return input !== undefined && input === document.activeElement;
}

function undo() {
  if (mode() !== "click") {
    if (marks.length) unmark(marks.at(-1));
    return;
  }
  asking?.abort();
  if (prompt.points.length) {
    prompt.points.pop();
    prompt.labels.pop();
  } else if (prompt.box) prompt.box = null;
  else kept.pop();
  if (prompt.points.length || prompt.box) cut();
  else showMasks(null);
}

function forgetLabels() {
  $("found").hidden = true;
  $("above-frame").hidden = true;
  stage.clear();
  showMarks();
}

// ---------------------------------------------------------------- clicks to masks

async function cut() {
  asking?.abort();
  const mine = (asking = new AbortController());
  const began = performance.now();
  prompt.found = null; // what is shown is of the prompt before
  showPrompt();
  try {
    const body = new FormData();
    body.append("image", file, file.name);
    const { box, points, labels } = prompt;
    body.append("prompts", JSON.stringify([{ box: box ?? undefined, points, labels }]));
    const options = { method: "POST", body, signal: mine.signal };
    const answer = await (await call("/v1/annotations/segment", options)).json();
    showMasks(answer.masks[0]);
    const seconds = ((performance.now() - began) / 1000).toFixed(2);
    $("step").textContent = `${seconds} s${answer.cached ? ", picture known" : ", first look"}`;
    fail(null);
  } catch (error) {
    if (error.name !== "AbortError") refused(error);
  }
}

function showPrompt() {
  stage.outlines = prompt.box ? [{ points: corners(prompt.box), colour: ACCENT, dashed: true }] : [];
  stage.dots = prompt.points.map((at, i) => ({ point: at, colour: signColour(prompt.labels[i]) }));
  stage.draw();
  offerActions();
}

/** The masks of all things so far, `current` being the one that is worked on. */
function showMasks(current) {
  prompt.found = current;
  const all = current ? [...kept, current] : kept;
  stage.cover(all.map(({ mask }, i) => ({ mask, colour: colourOf(i) })));
  showPrompt();
  showLabels(
    all.map((one, i) => ({
      name: `${i + 1}`,
      about: `${one.area.toLocaleString("en")} px, IoU ${Math.min(one.predicted_iou, 1).toFixed(2)}`,
      colour: colourOf(i),
    })),
  );
  forgetFiles();
}

function keep() {
  if (mode() !== "click" || !prompt.found) return;
  kept.push(prompt.found);
  prompt = emptyPrompt();
  $("not-this").checked = false;
  showPrompt();
}

// ---------------------------------------------------------------- jobs

async function label() {
  if (!file) return fail("Choose a picture first.");
  const { signal } = (job = new AbortController());
  busy(true);
  try {
    const kind = mode();
    const options = { method: "POST", body: order(kind), signal };
    const begun = await (await call(`/v1/annotations/${kind}`, options)).json();
    await follow(begun.id);
    const made = await (await call(`/v1/jobs/${begun.id}/result`, { signal })).json();
    await (kind === "text" ? showWords(made) : showCars(made));
    showFiles(made, refused);
    $("step").textContent = "done";
  } catch (error) {
    $("step").textContent = "";
    if (error.name === "AbortError") $("step").textContent = "stopped";
    else refused(error);
  } finally {
    job = null;
    busy(false);
  }
}

function order(kind) {
  const body = new FormData();
  body.append("image", file, file.name);
  body.append("wait", "false");
  if (kind === "text") {
    const untyped = marks.find(({ input }) => !input.value.trim());
    untyped?.input.focus();
    if (untyped) throw new Error("Type what this word says, or take its box away.");
    if (marks.length) body.append("words", JSON.stringify(marks.map(wordOf)));
    body.append("refine", $("refine").value);
    body.append("min_score", $("min-score").value || "0");
    return body;
  }
  if (!$("calibration").files.length) throw new Error("Choose the calibration of the frame.");
  if (!marks.length) throw new Error("Mark at least one car on the picture.");
  body.append("calibration", $("calibration").files[0]);
  if ($("points").files.length) body.append("points", $("points").files[0]);
  body.append("prompts", JSON.stringify(marks));
  body.append("driving_side", $("side").value);
  body.append("meshes", $("meshes").checked);
  return body;
}

function wordOf({ box, input }) {
  return { polygon: corners(box), text: input.value.trim() };
}

/** Shows the progress until the job is final; leaving withdraws it. */
async function follow(id) {
  const withdraw = () => call(`/v1/jobs/${id}`, { method: "DELETE" }).catch(() => {});
  job.signal.addEventListener("abort", withdraw);
  const answer = await call(`/v1/jobs/${id}/events`, { signal: job.signal });
  for await (const event of events(answer.body)) {
    if (event.error) throw new Refused(event.status, event);
    const at = event.state ?? event;
    $("progress").value = at.progress;
    $("step").textContent = at.total_steps ? `${at.step} of ${at.total_steps}` : "waiting";
    // A queued job may tell what it waits for; it goes on.
    if (at.status === "failed") throw new Error(at.problem.detail);
  }
}

function showWords(made) {
  const masks = [];
  const entries = [];
  stage.clear();
  for (const word of made.words) {
    const first = word.characters.findIndex((one) => !one.refused);
    const colour = first < 0 ? GRAY : colourOf(masks.length + first);
    for (const one of word.characters) {
      const own = one.refused ? GRAY : colourOf(masks.length);
      masks.push({ mask: one.mask, colour: own });
      stage.outlines.push({ points: corners(one.box), colour: css(own), thin: true });
    }
    stage.outlines.push({ points: word.polygon, colour: ACCENT, dashed: true, thin: true });
    const flags = new Set([...word.flags, ...word.characters.flatMap((one) => one.flags)]);
    const about = word.ignore ? "ignored" : word.score.toFixed(2);
    entries.push({ name: word.text, about, flags: [...flags], refused: word.refused, colour });
  }
  stage.cover(masks, 180);
  stage.draw();
  showLabels(entries, "No text was found; drag boxes around words and type them.");
}

async function showCars(made) {
  stage.clear();
  stage.cover(made.objects.map(({ mask, car }, i) => ({ mask, colour: car ? colourOf(i) : GRAY })));
  stage.outlines = made.objects.flatMap(({ car }, i) =>
    car ? carOutlines(car, css(colourOf(i))) : [],
  );
  stage.draw();
  showLabels(
    made.objects.map(({ car, refused: reason }, i) => ({
      name: car ? `${car.kind} ${i + 1}` : `${i + 1}`,
      about: car ? `${car.location[2].toFixed(1)} m, score ${car.score.toFixed(2)}` : "",
      flags: car?.flags ?? [],
      refused: reason,
      colour: car ? colourOf(i) : GRAY,
    })),
  );
  URL.revokeObjectURL($("above").src);
  const seen = await call(made.birds_eye, { signal: job.signal });
  $("above").src = URL.createObjectURL(await seen.blob());
  $("above-frame").hidden = false;
}

// ---------------------------------------------------------------- what is shown when

function busy(yes) {
  $("start").disabled = yes;
  $("stop").hidden = !yes;
  $("progress").hidden = !yes;
  if (!yes) return;
  fail(null);
  $("progress").value = 0;
  $("step").textContent = "waiting";
}

function offerActions() {
  const clicked = prompt.box || prompt.points.length || kept.length;
  $("keep").disabled = !prompt.found;
  $("undo").disabled = !(mode() === "click" ? clicked : marks.length);
}

function changeMode() {
  document.querySelectorAll("form > section").forEach((section) => {
    section.hidden = section.dataset.mode !== mode();
  });
  $("start").hidden = mode() === "click";
  $("keep").hidden = mode() !== "click";
  startAnew();
  sayWhatIsMissing();
}

function sayWhatIsMissing() {
  if (!models.length) return;
  const able = models.filter((model) => model.tasks.includes(TASKS[mode()]));
  fail(able.length ? able[0].missing : "No model of this server can do that.");
}

function refused(error) {
  if (error.status === 401) $("key-box").hidden = false;
  if (error.status !== 401 || $("key").value) fail(error.message);
}

function fail(sentence) {
  $("error").hidden = !sentence;
  $("error").textContent = sentence ?? "";
}

// ---------------------------------------------------------------- wiring

async function loadModels() {
  try {
    models = (await (await call("/v1/models")).json()).data;
    $("key-box").hidden = !$("key").value;
    sayWhatIsMissing();
  } catch (error) {
    refused(error);
  }
}

keepKey(loadModels);
$("image").addEventListener("change", () => {
  if ($("image").files.length) open($("image").files[0]);
});
$("modes").addEventListener("change", changeMode);
$("keep").addEventListener("click", keep);
$("undo").addEventListener("click", undo);
$("stop").addEventListener("click", () => job?.abort());
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (mode() !== "click" && !job) label();
});
for (const name of ["dragover", "dragleave", "drop"]) {
  $("frame").addEventListener(name, (event) => {
    event.preventDefault();
    $("frame").classList.toggle("over", name === "dragover");
    if (name !== "drop" || !event.dataTransfer.files.length) return;
    $("image").files = event.dataTransfer.files;
    open($("image").files[0]);
  });
}
addEventListener("resize", () => stage.draw());

changeMode();
watchReadiness();
loadModels();
