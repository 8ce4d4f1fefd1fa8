// SPDX-FileCopyrightText: Brain LDM contributors
// SPDX-License-Identifier: Apache-2.0
// In the reports that `serve` shows: a click on a picture opens the volume behind it.

import {Viewer, element} from "./viewer.js";

const viewer = new Viewer("volume");
const picture = element("img", {alt: "outlines"});
const close = element("button", {type: "button", textContent: "Close (Esc)"});
const dialog = element("dialog", {className: "volume"}, close, picture, viewer.box);
let started = null;
document.body.append(dialog);
close.addEventListener("click", () => dialog.close());

async function open(key, title, large) {
  picture.hidden = !large;
  if (large) picture.src = large;
  dialog.showModal();
  started ??= viewer.start();
  await started;
  const address = `volume/${encodeURIComponent(key)}`;
  const answer = await fetch(address, {method: "HEAD"});
  const file = decodeURIComponent(answer.headers.get("x-file") ?? "");
  await viewer.show({title, url: answer.ok ? address : "", name: file || "volume.nii.gz"});
}

document.addEventListener("click", event => {
  const image = event.target.closest("img"), link = event.target.closest("a");
  if (document.body.dataset.report === "quality" && link?.querySelector("img")) {
    event.preventDefault();
    const row = link.closest("tr");
    open(row?.dataset.scan ?? "", row?.dataset.scan ?? "", link.href);
  } else if (image?.dataset.volumes) {
    const paths = JSON.parse(image.dataset.volumes), box = image.getBoundingClientRect();
    const row = Math.min(paths.length - 1, Math.floor((event.clientY - box.top) / box.height * paths.length));
    open(String(row), paths[row].split("/").pop());
  }
});

for (const image of document.querySelectorAll("img[data-volumes]")) {
  const paths = JSON.parse(image.dataset.volumes);
  image.style.cursor = "pointer";
  image.after(element("p", {}, "Open ", ...paths.flatMap((path, row) => {
    const button = element("button", {type: "button", className: "plain", textContent: path.split("/").pop()});
    button.addEventListener("click", () => open(String(row), path.split("/").pop()));
    return [button];
  })));
}
document.body.dataset.viewer = "ready";
