// SPDX-FileCopyrightText: Brain LDM contributors
// SPDX-License-Identifier: Apache-2.0
// The page: asks for samples, follows the queue, and shows what there is.

import {GREATEST_DIFFERENCE, Viewer, difference, element, link} from "./viewer.js";

const at = id => document.getElementById(id);
const COLOURS = {outer_fluid: [70, 120, 190], grey: [205, 130, 70], white: [235, 225, 200], lateral_ventricles: [215, 60, 60],
                 third_ventricle: [150, 80, 190], fourth_ventricle: [70, 170, 110]};
const CARDS = 24;
const QUICK = 400, SLOW = 4000;
const UNFINISHED = ["waiting", "running"];

let about, model, gallery = [], jobs = [], cards = CARDS, timer = 0, gone = false;
const wanted = new Map();  // entry -> panel that it goes to once it is there
const sides = [new Viewer("left head"), new Viewer("right head")];
const changes = new Viewer("difference, right minus left");
let strip = JSON.parse(sessionStorage.getItem("strip") ?? "null");

// Numbers and words.

const title = name => (name.charAt(0).toUpperCase() + name.slice(1)).replaceAll("_", " ");
const label = condition => title(condition.raw.replace(`_${condition.unit}`, "").replace(/_vol$/, "_volume"));
const unit = condition => condition.unit === "mm3" ? "mL" : condition.unit;
const factor = condition => condition.unit === "mm3" ? 1000 : 1;
const digits = condition => (condition.maximum - condition.minimum) / factor(condition) > 20 ? 0 : 2;
const shown = (condition, raw) => Number((raw / factor(condition)).toFixed(digits(condition)));
const written = (condition, raw) =>
  typeof raw === "string" ? raw : `${shown(condition, raw)} ${unit(condition)}`.trim();
const modelOf = entry => about.models.find(one => one.name === entry.request.model);
const named = (condition, raw) => ["", "years"].includes(condition.unit) ? written(condition, raw)
  : `${label(condition).toLowerCase().replace(/ volume$/, "")} ${written(condition, raw)}`;
const caption = entry => (modelOf(entry)?.conditions ?? []).filter(c => c.raw in entry.conditions)
  .map(c => named(c, entry.conditions[c.raw])).join(", ") || "no conditions";
const heading = entry => `${caption(entry)}; seed ${entry.seed}`;
const entryOf = name => gallery.find(one => one.name === name);

// What is asked for.

function sliders() {
  at("conditions").replaceChildren(...model.conditions.map(condition => {
    const codes = Object.keys(condition.codes);
    return codes.length ? choice(condition, codes) : slider(condition);
  }));
}

function choice(condition, codes) {
  const start = codes.find(code => condition.codes[code] === condition.start) ?? codes[0];
  const words = codes.map(code => element("label", {},
    element("input", {type: "radio", name: condition.raw, value: code, checked: code === start}), ` ${code}`));
  return element("fieldset", {className: "field"}, element("legend", {textContent: label(condition)}),
    element("div", {className: "words"}, ...words));
}

function slider(condition) {
  const ends = {min: shown(condition, condition.low), max: shown(condition, condition.high)};
  const step = 10 ** -digits(condition), value = shown(condition, condition.start);
  const number = element("input", {type: "number", id: condition.raw, step, value, required: true});
  const range = element("input", {type: "range", ...ends, step, value, "aria-label": label(condition), name: condition.raw});
  const [low, high] = [condition.minimum, condition.maximum].map(raw => shown(condition, raw));
  const note = element("p");
  const place = raw => (shown(condition, raw) - ends.min) / (ends.max - ends.min);
  const track = element("div", {className: "track"}, range);
  track.style.setProperty("--from", place(condition.minimum));
  track.style.setProperty("--to", place(condition.maximum));
  const tell = () => {
    const outside = number.value !== "" && (Number(number.value) < low || Number(number.value) > high);
    note.textContent = `trained on ${low} to ${high} ${unit(condition)}${outside ? ": this is beyond" : ""}`;
    note.className = outside ? "outside" : "";
  };
  range.addEventListener("input", () => { number.value = range.value; tell(); });
  number.addEventListener("input", () => { range.value = number.value; tell(); });
  tell();
  return element("div", {className: "field"},
    element("div", {className: "head"}, element("label", {htmlFor: condition.raw, textContent: label(condition)}),
      element("span", {}, number, ` ${unit(condition)}`)), track, note);
}

function settings() {
  const conditions = {};
  for (const c of model.conditions)
    conditions[c.raw] = Object.keys(c.codes).length ? at("request").elements[c.raw].value
      : Math.round(Number(at(c.raw).value) * factor(c) * 1e6) / 1e6;
  const sampled = at("sampler").value ? {sampler: at("sampler").value, num_inference_steps: Number(at("steps").value)} : {};
  return {model: model.name, conditions, seed: Number(at("seed").value), ...sampled, labels: at("measure").checked};
}

function take(entry) {
  const its = modelOf(entry);
  if (!its) return;
  at("model").value = its.name;
  choose();
  for (const c of model.conditions) {
    if (!(c.raw in entry.conditions)) continue;
    if (Object.keys(c.codes).length) { at("request").elements[c.raw].value = entry.conditions[c.raw]; continue; }
    at(c.raw).value = shown(c, entry.conditions[c.raw]);
    at(c.raw).dispatchEvent(new Event("input"));
  }
  at("seed").value = entry.seed;
  if (entry.request.sampler) {
    at("sampler").value = entry.request.sampler;
    at("steps").value = entry.request.num_inference_steps ?? model.samplers[entry.request.sampler];
  }
}

function choose() {
  model = about.models.find(one => one.name === at("model").value) ?? about.models[0];
  sliders();
  const names = Object.keys(model.samplers), moved = model.conditions.filter(c => !Object.keys(c.codes).length);
  at("sampler").replaceChildren(...names.map(name => element("option", {value: name, textContent: name})));
  at("sampler").value = model.sampler ?? "";
  at("sampling").hidden = names.length === 0;
  at("strip-settings").hidden = moved.length === 0;
  at("strip-condition").replaceChildren(...moved.map(c => element("option", {value: c.raw, textContent: label(c)})));
  steps();
}

function steps() {
  at("steps").value = model.samplers[at("sampler").value] ?? "";
}

async function post(address, content = {}) {
  const answer = await fetch(address, {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(content)});
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(said.error ?? `the server said ${answer.status}`);
  return said;
}

async function ask(content, panel) {
  at("refused").textContent = "";
  if (!at("request").reportValidity()) return null;
  try {
    const [job] = await post("/api/samples", content);
    if (panel !== undefined) {
      wanted.set(job.entry, panel);
      if (entryOf(job.entry)) show(panel, job.entry);
    }
    follow(QUICK);
    return job.entry;
  } catch (error) {
    at("refused").textContent = error.message;
    return null;
  }
}

async function sampleStrip() {
  const condition = model.conditions.find(c => c.raw === at("strip-condition").value), base = settings();
  const count = Math.min(9, Math.max(2, Number(at("strip-count").value))), heads = [];
  for (let i = 0; i < count; i++) {
    const raw = condition.minimum + (condition.maximum - condition.minimum) * i / (count - 1);
    const value = shown(condition, raw) * factor(condition);
    const entry = await ask({...base, conditions: {...base.conditions, [condition.raw]: value}, labels: false});
    if (!entry) break;
    heads.push({entry, text: written(condition, value)});
  }
  strip = {title: `${label(condition)} from ${heads[0]?.text} to ${heads.at(-1)?.text}, seed ${base.seed}`, heads};
  sessionStorage.setItem("strip", JSON.stringify(strip));
  drawStrip();
}

// The queue.

async function follow(wait) {
  clearTimeout(timer);
  timer = setTimeout(poll, wait);
}

async function poll() {
  const before = new Map(jobs.map(job => [job.number, job.state]));
  try {
    jobs = await (await fetch("/api/jobs")).json();
    if (gone) { gone = false; at("refused").textContent = ""; }
    if (jobs.some(job => job.state === "done" && before.get(job.number) !== "done")) await refresh();
  } catch (error) {
    gone = true;
    at("refused").textContent = "the server does not answer: was it ended?";
  }
  drawJobs(before);
  follow(jobs.some(job => UNFINISHED.includes(job.state)) ? QUICK : SLOW);
}

const KINDS = {sample: "sampling", segment: "labelling"};

function words(job) {
  const at = `step ${job.step} of ${job.steps}`;
  const left = job.left === null || job.left === undefined ? "" : `, about ${Math.ceil(job.left)} s left`;
  if (job.state === "failed") return job.error;
  if (job.state === "waiting") return "waits";
  if (job.kind === "segment" || !job.steps) return `${Math.round(job.seconds)} s so far`;
  return job.step < job.steps ? at + left : `decoding${left}`;
}

function jobItem(job) {
  const stop = element("button", {type: "button", textContent: "Stop", "aria-label": `Stop job ${job.number}`});
  stop.addEventListener("click", () => post(`/api/jobs/${job.number}/stop`).catch(() => {}).then(() => follow(50)));
  const item = element("li", {}, element("div", {className: "row"}, element("span"), stop),
    element("progress", {max: 1, "aria-label": `job ${job.number}`}));
  item.dataset.job = job.number;
  return item;
}

function drawJobs(before) {
  const listed = jobs.filter(job => UNFINISHED.includes(job.state) || (job.state === "failed" && jobs.indexOf(job) > jobs.length - 4));
  // An item stays the same element while it changes: a click on a button that is replaced meanwhile is none.
  const there = new Map([...at("jobs").children].map(item => [item.dataset.job, item]));
  for (const [number, item] of there) if (!listed.some(job => String(job.number) === number)) item.remove();
  for (const job of listed) {
    const item = there.get(String(job.number)) ?? at("jobs").appendChild(jobItem(job));
    const [said, stop, bar] = [item.querySelector("span"), item.querySelector("button"), item.querySelector("progress")];
    item.className = job.state;
    said.textContent = `${KINDS[job.kind]} ${job.number}: ${words(job)}`;
    stop.hidden = bar.hidden = job.state === "failed";
    bar.max = job.steps || 1;
    if (job.state === "running" && !(job.steps && job.step < job.steps)) bar.removeAttribute("value");
    else bar.value = job.step;
  }
  const ended = jobs.filter(job => before.has(job.number) && before.get(job.number) !== job.state && !UNFINISHED.includes(job.state));
  if (ended.length) at("status").textContent = ended.map(job => `${KINDS[job.kind]} ${job.number} ${job.state}`).join(", ");
}

async function refresh() {
  gallery = await (await fetch("/api/gallery")).json();
  for (const [name, panel] of wanted)
    if (entryOf(name)) { wanted.delete(name); await show(panel, name); }
  drawGallery();
  drawStrip();
  drawDetails();
  await drawLabels();
}

// The heads.

function what(name) {
  if (name.startsWith("opened-")) {
    const number = Number(name.slice(7));
    if (!(number in about.volumes)) return null;
    const file = about.files[number];
    return {title: about.volumes[number], url: `/opened/${number}/${file}`, name: file};
  }
  const entry = entryOf(name);
  return entry && {title: heading(entry), url: `/gallery/${name}/volume.nii.gz`, name: "volume.nii.gz", range: [0, 1]};
}

async function show(panel, name) {
  const found = name && what(name);
  sides[panel].entry = found ? name : null;
  layout();
  remember();
  await sides[panel].show(found ?? null);
  await drawLabels();
  await drawDifference();
  drawGallery();
  drawDetails();
}

function layout() {
  const several = Boolean(sides[0].entry && sides[1].entry);
  at("viewers").classList.toggle("several", several);
  at("difference").disabled = at("swap").disabled = at("alone").disabled = !several;
  if (!several) press("difference", false);
  place(sides[1], Boolean(sides[1].entry));
  place(changes, several && isPressed("difference"));
  const seen = [...sides, changes].filter(side => !isAway(side));
  for (const side of [...sides, changes]) side.nv.broadcastTo([]);
  link(seen);
}

// A panel that is not shown keeps its size, out of sight: a canvas without any cannot be drawn on.
const isAway = side => side.box.classList.contains("away");
const place = (side, seen) => side.box.classList.toggle("away", !seen);

const isPressed = id => at(id).getAttribute("aria-pressed") === "true";
const press = (id, yes) => at(id).setAttribute("aria-pressed", String(yes));

async function drawLabels() {
  const there = sides.map(side => Boolean(side.entry && entryOf(side.entry)?.has_labels));
  at("labels").disabled = !there.some(Boolean);
  const wants = isPressed("labels") && there.some(Boolean), opacity = Number(at("opacity").value);
  for (const [i, side] of sides.entries()) {
    const url = wants && there[i] && side.nv.volumes.length ? `/gallery/${side.entry}/labels.nii.gz` : null;
    if (side.labelled === url && side.labelledOf === side.loads) continue;
    [side.labelled, side.labelledOf] = [url, side.loads];
    await side.label(url, about.structures, opacity);
  }
  at("legend").replaceChildren(...(wants ? about.structures.filter(one => one.codes[0]).map(legendOf) : []));
}

function legendOf(structure) {
  const swatch = element("i");
  swatch.style.background = `rgb(${structure.colour})`;
  const found = sides.filter(side => side.entry).map(side => entryOf(side.entry)?.volumes[`${structure.name}_mm3`])
    .filter(volume => volume).map(volume => `${(volume / 1000).toFixed(1)} mL`);
  return element("li", {}, swatch, `${structure.title}${found.length ? " " + found.join(" | ") : ""}`);
}

async function drawDifference() {
  const [first, second] = sides.map(side => side.nv.volumes[0]);
  if (isAway(changes) || !first || !second) return;
  const volume = difference(first, second);
  const scale = `blue to red: ${-GREATEST_DIFFERENCE} to ${GREATEST_DIFFERENCE}`;
  const titled = volume ? `right minus left, ${scale}` : "the two lie on different grids";
  await changes.show(volume && {title: titled, volume, colormap: "difference", range: [-GREATEST_DIFFERENCE, GREATEST_DIFFERENCE]});
  changes.title.textContent = titled;
}

function drawDetails() {
  const entries = sides.map(side => side.entry && entryOf(side.entry)).filter(Boolean);
  at("details").replaceChildren(...entries.map((entry, i) => {
    const table = element("table", {}, element("thead", {}, element("tr", {}, ...["", "asked for", "measured"].map((text, n) =>
      element("th", {scope: "col", textContent: text, className: n ? "number" : ""})))));
    const conditions = modelOf(entry)?.conditions ?? [];
    const rows = conditions.map(c => [label(c), written(c, entry.conditions[c.raw] ?? ""),
      entry.volumes[c.raw] ? written(c, Number(entry.volumes[c.raw])) : ""]);
    for (const name of ["grey", "white"])
      if (entry.volumes[`${name}_mm3`]) rows.push([`${title(name)} matter`, "", `${Math.round(entry.volumes[`${name}_mm3`] / 1000)} mL`]);
    table.append(element("tbody", {}, ...rows.map(row => element("tr", {}, ...row.map((text, n) =>
      element(n ? "td" : "th", {textContent: text, className: n ? "number" : ""}))))));
    const files = [["volume.nii.gz", "NIfTI"], ["sidecar.json", "Sidecar"], ["picture.png", "Picture"],
      ...(entry.has_labels ? [["labels.nii.gz", "Labels"]] : [])];
    const links = files.map(([file, text]) => element("a", {className: "button", href: `/gallery/${entry.name}/${file}?save`,
      download: "", textContent: text}));
    const same = element("button", {type: "button", textContent: "Take these settings"});
    same.addEventListener("click", () => take(entry));
    const measure = element("button", {type: "button", textContent: "Label and measure", hidden: entry.has_labels});
    measure.addEventListener("click", () => post(`/api/samples/${entry.name}/labels`).then(() => follow(QUICK), said));
    const copy = element("button", {type: "button", className: "plain", textContent: "Copy"});
    copy.addEventListener("click", () => navigator.clipboard?.writeText(entry.command).then(() => { copy.textContent = "Copied"; }, () => {}));
    return element("section", {}, element("h2", {textContent: entries.length > 1 ? `${i ? "Right" : "Left"}: ${heading(entry)}` : heading(entry)}),
      element("div", {className: "wide"}, table), element("div", {className: "row main-links"}, ...links, same, measure),
      element("h3", {textContent: "The command that makes the same volume"}), element("pre", {className: "command", textContent: entry.command}), copy);
  }));
}

function said(error) {
  at("refused").textContent = error.message;
}

function card(entry) {
  const view = element("button", {type: "button", textContent: "View"}), beside = element("button", {type: "button", textContent: "Beside"});
  view.addEventListener("click", () => { show(0, entry.name); at("heads").scrollIntoView(); });
  beside.addEventListener("click", () => { show(sides[0].entry ? 1 : 0, entry.name); at("heads").scrollIntoView(); });
  for (const [button, text] of [[view, "View"], [beside, "View beside"]]) button.setAttribute("aria-label", `${text}: ${heading(entry)}`);
  return element("li", {className: sides.some(side => side.entry === entry.name) ? "shown" : ""},
    element("img", {src: `/gallery/${entry.name}/picture.png`, loading: "lazy", alt: `mid planes: ${heading(entry)}`}),
    element("p", {textContent: `${heading(entry)}; ${[entry.request.model, entry.sampler].filter(Boolean).join(", ")}`}),
    element("div", {className: "row"}, view, beside));
}

function drawGallery() {
  at("no-gallery").hidden = gallery.length > 0;
  at("more").hidden = gallery.length <= cards;
  const focused = document.activeElement?.getAttribute("aria-label");
  at("gallery").replaceChildren(...gallery.slice(0, cards).map(card));
  if (focused && document.activeElement === document.body)
    [...at("gallery").querySelectorAll("button")].find(one => one.getAttribute("aria-label") === focused)?.focus();
}

function drawStrip() {
  at("strip-part").hidden = !strip;
  if (!strip) return;
  at("strip-title").textContent = strip.title;
  const heads = strip.heads.map(head => head.entry).join(" ");
  if (at("strip").dataset.heads !== heads) {
    at("strip").dataset.heads = heads;
    at("strip").replaceChildren(...strip.heads.map(stripHead));
  }
  // As in the queue, a head stays the same element when it comes, so that no click is lost.
  for (const [i, button] of [...at("strip").querySelectorAll("button")].entries()) {
    const come = entryOf(strip.heads[i].entry);
    button.disabled = !come;
    if (come && !button.firstChild) button.append(element("img", {src: `/gallery/${come.name}/picture.png`, alt: ""}));
  }
}

function stripHead(head) {
  const button = element("button", {type: "button", "aria-label": `View ${head.text}`});
  button.addEventListener("click", () => show(0, head.entry));
  return element("li", {}, button, head.text);
}

// Addresses: what is shown stands behind the #, so that it is shown again after a reload.

function remember() {
  const names = sides.map(side => side.entry).filter(Boolean);
  history.replaceState(null, "", names.length ? `#${names.join("+")}` : location.pathname);
}

function openVolume(panel) {
  const number = about.volumes.indexOf(at("volume").value);
  if (number < 0) said(new Error("choose one of the folder's volumes")); else show(panel, `opened-${number}`);
}

async function start() {
  about = await (await fetch("/api/about")).json();
  for (const one of about.structures) one.colour = COLOURS[one.name] ?? [0, 0, 0];
  at("viewers").append(...[...sides, changes].map(side => side.box));
  place(sides[1], false);
  place(changes, false);
  for (const side of [...sides, changes]) await side.start();
  layout();
  at("model").replaceChildren(...about.models.map(one => element("option", {value: one.name, textContent: one.name})));
  choose();
  if (about.seed !== null) at("seed").value = about.seed;
  at("opened-part").hidden = about.volumes.length === 0;
  at("folder").textContent = about.folder ?? "";
  at("volumes").append(...about.volumes.map(name => element("option", {value: name})));
  at("volume").value = about.volumes[0] ?? "";
  at("reports").append(...about.reports.map(one => element("a", {href: one.address, textContent: one.title, target: "_blank"})));
  await refresh();
  const names = location.hash.slice(1).split("+").filter(name => name && what(name)).slice(0, 2);
  if (!names.length && gallery.length) names.push(gallery[0].name);
  for (const [i, name] of names.entries()) await show(i, name);
  document.body.dataset.ready = "yes";
  poll();
}

at("model").addEventListener("change", choose);
at("sampler").addEventListener("change", steps);
at("new-seed").addEventListener("click", () => { at("seed").value = Math.floor(Math.random() * 2 ** 31); });
at("request").addEventListener("submit", event => { event.preventDefault(); ask(settings(), 0); });
at("sample-beside").addEventListener("click", () => ask(settings(), sides[0].entry ? 1 : 0));
at("sample-strip").addEventListener("click", sampleStrip);
at("view").addEventListener("change", () => { for (const side of [...sides, changes]) side.setView(at("view").value); });
at("labels").addEventListener("click", () => { press("labels", !isPressed("labels")); drawLabels(); });
at("opacity").addEventListener("input", () => { for (const side of sides) side.setOpacity(Number(at("opacity").value)); });
at("difference").addEventListener("click", () => { press("difference", !isPressed("difference")); layout(); drawDifference(); });
at("swap").addEventListener("click", async () => { const [a, b] = sides.map(side => side.entry); await show(0, b); await show(1, a); });
at("alone").addEventListener("click", () => show(1, null));
at("more").addEventListener("click", () => { cards += CARDS; drawGallery(); });
at("open-volume").addEventListener("click", () => openVolume(0));
at("open-beside").addEventListener("click", () => openVolume(sides[0].entry ? 1 : 0));
start().catch(error => { at("refused").textContent = `the page cannot start: ${error.message}`; });
