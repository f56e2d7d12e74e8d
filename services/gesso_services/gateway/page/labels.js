/** The list of labels under the picture, and the files that can be saved of them. */

import { $, call } from "/page/server.js";
import { css } from "/page/masks.js";

/** One entry per label: {name, about, flags, refused, colour}; `nothing` is said where none is. */
export function showLabels(entries, nothing = "") {
  $("labels").replaceChildren(
    ...entries.map(({ name, about, flags = [], refused: reason, colour }) => {
      const item = document.createElement("li");
      item.style.setProperty("--swatch", css(colour));
      item.classList.toggle("refused", Boolean(reason));
      item.append(element("b", name), " ", about);
      const remarks = flags.map((flag) => flag.replaceAll("_", " ")).join(" · ");
      for (const remark of [reason, remarks]) if (remark) item.append(" ", element("em", remark));
      return item;
    }),
  );
  if (!entries.length && nothing) $("labels").append(element("li", nothing));
  $("found").hidden = !entries.length && !nothing;
}

/** The files of a finished job and what made them; `failed` hears what cannot be saved. */
export function showFiles(made, failed) {
  const links = { ...made.exports, picture: made.overlay };
  if (made.meshes) links["shapes (GLB)"] = made.meshes;
  $("made-by").hidden = false;
  $("exports").replaceChildren(
    "save as ",
    ...Object.entries(links).map(([name, path]) => saveButton(name, path, failed)),
  );
  const { versions, ...facts } = made.provenance;
  const rows = Object.entries({ ...facts, ...versions }).filter(([, value]) => value !== null);
  $("provenance").replaceChildren(
    ...rows.flatMap(([name, value]) => [
      element("dt", name.replaceAll("_", " ")),
      element("dd", `${value}`),
    ]),
  );
}

/** Leaves nothing of a former job. */
export function forgetFiles() {
  $("made-by").hidden = true;
  $("exports").replaceChildren();
  $("provenance").replaceChildren();
}

/** A link would not carry the key along. */
function saveButton(name, path, failed) {
  const button = element("button", name);
  button.type = "button";
  button.className = "link";
  button.addEventListener("click", () => save(path).catch(failed));
  return button;
}

async function save(path) {
  const answer = await call(path);
  const named = /filename\*=UTF-8''(.+)/.exec(answer.headers.get("Content-Disposition") ?? "");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await answer.blob());
  const ending = answer.headers.get("Content-Type") === "image/png" ? "png" : "glb";
  link.download = named ? decodeURIComponent(named[1]) : `${path.split("/").at(-1)}.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function element(name, text) {
  return Object.assign(document.createElement(name), { textContent: text });
}
