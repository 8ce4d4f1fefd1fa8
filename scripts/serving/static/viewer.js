// SPDX-FileCopyrightText: Brain LDM contributors
// SPDX-License-Identifier: Apache-2.0
// Volumes in NiiVue: three planes and a rendering, a crosshair in millimetres, labels, differences.

const MULTIPLANAR = 3;
const OPTIONS = {
  backColor: [0, 0, 0, 1],
  crosshairColor: [0.95, 0.75, 0.2, 0.8],
  crosshairWidth: 1,
  crosshairWidthUnit: "mm",
  show3Dcrosshair: true,
  isRadiologicalConvention: true,
  isColorbar: false,
  multiplanarLayout: 2,
  multiplanarShowRender: 1,
  multiplanarPadPixels: 4,
  sliceType: MULTIPLANAR,
  dragAndDropEnabled: false,
  fontColor: [0.95, 0.95, 0.95, 1],
  fontMinPx: 15,
  fontSizeScaling: 0.5,
  loadingText: "",
  logLevel: "error",
};
const STEPS = {
  ArrowLeft: [-1, 0, 0], ArrowRight: [1, 0, 0], ArrowDown: [0, 0, -1], ArrowUp: [0, 0, 1],
  PageDown: [0, -1, 0], PageUp: [0, 1, 0],
};
// From blue by nothing to red: equal voxels are black in the planes, and let the others through in the rendering.
const DIFFERENCE = {R: [130, 40, 0, 0, 220, 255], G: [190, 110, 0, 0, 90, 190], B: [255, 220, 0, 0, 40, 120],
                    A: [255, 180, 0, 0, 180, 255], I: [0, 70, 125, 130, 185, 255]};
export const GREATEST_DIFFERENCE = 0.4;

export function element(kind, properties = {}, ...children) {
  const made = document.createElement(kind);
  for (const [name, value] of Object.entries(properties))
    if (name in made) made[name] = value; else made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// One panel: a heading, a canvas, and what is under the crosshair.
export class Viewer {
  constructor(name) {
    this.title = element("strong", {textContent: ""});
    this.at = element("span", {textContent: ""});
    this.canvas = element("canvas", {tabIndex: 0, role: "img", "aria-label": `${name}: arrows and page keys move the crosshair`});
    this.empty = element("div", {className: "empty", textContent: "no volume"});
    this.place = element("div", {className: "canvas"}, this.canvas, this.empty);
    this.box = element("section", {className: "viewer", "aria-label": name},
      element("header", {}, this.title), this.place, element("footer", {}, this.at));
    this.shown = null;
    this.loads = 0;
    this.place.addEventListener("keydown", event => this.move(event), {capture: true});
  }

  async start() {
    this.nv = new niivue.Niivue({...OPTIONS});
    this.nv.onLocationChange = location => this.tell(location);
    await this.nv.attachToCanvas(this.canvas);
    this.nv.addColormap("difference", DIFFERENCE);
  }

  move(event) {
    const step = STEPS[event.key];
    if (!step || !this.nv.volumes.length || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    const size = event.shiftKey ? 10 : 1;
    this.nv.moveCrosshairInVox(...step.map(one => one * size));
  }

  tell(location) {
    const [x, y, z] = location.mm, value = location.values?.[0]?.value;
    const sides = [x < 0 ? "left" : "right", y < 0 ? "back" : "front", z < 0 ? "below" : "above"];
    this.at.textContent = [x, y, z].map((mm, i) => `${Math.abs(mm).toFixed(1)} mm ${sides[i]}`).join(", ")
      + (value === undefined ? "" : `; intensity ${value.toFixed(3)}`);
  }

  // What to show: {title, url, name, range}; null for nothing. Resolves to whether it is shown, and not another since.
  async show(what) {
    const load = ++this.loads;
    this.shown = what;
    this.title.textContent = what ? what.title : "";
    this.empty.hidden = false;
    this.empty.textContent = what ? "loading" : "no volume";
    try {
      const volume = what ? what.volume ?? await niivue.NVImage.loadFromUrl({url: what.url, name: what.name}) : null;
      if (load !== this.loads) return false;
      while (this.nv.volumes.length) this.nv.removeVolumeByIndex(0);
      if (!volume) { this.nv.drawScene(); this.at.textContent = ""; return true; }
      if (what.colormap) volume.colormap = what.colormap;
      if (what.range) [volume.cal_min, volume.cal_max] = what.range;  // after the colours, which choose one of their own
      this.nv.addVolume(volume);
      this.nv.updateGLVolume();
    } catch (error) {
      if (load === this.loads) this.empty.textContent = `cannot be shown: ${error.message ?? error}`;
      return false;
    }
    this.empty.hidden = true;
    this.canvas.dataset.shown = what.title;
    this.nv.createOnLocationChange();
    return true;
  }

  async label(url, structures, opacity) {
    while (this.nv.volumes.length > 1) this.nv.removeVolumeByIndex(1);
    const load = this.loads;
    if (url && this.nv.volumes.length) {
      const map = await niivue.NVImage.loadFromUrl({url, name: "labels.nii.gz"});
      if (load !== this.loads) return;
      map.setColormapLabel(labelColours(structures));
      map.opacity = opacity;
      this.nv.addVolume(map);
    }
    this.nv.updateGLVolume();
  }

  setOpacity(opacity) {
    if (this.nv.volumes.length > 1) this.nv.setOpacity(1, opacity);
  }

  setView(type) {
    this.nv.setSliceType(Number(type));
  }
}

// The crosshair of each goes where that of another is put.
export function link(viewers) {
  for (const one of viewers)
    one.nv.broadcastTo(viewers.filter(other => other !== one).map(other => other.nv), {"2d": true, "3d": true, crosshair: true});
}

function labelColours(structures) {
  const rows = structures.flatMap(one => one.codes.map(code => [code, one])).sort((a, b) => a[0] - b[0]);
  const colours = rows.map(([code, one]) => [...one.colour, code ? 255 : 0]);
  const [R, G, B, A] = [0, 1, 2, 3].map(i => colours.map(colour => colour[i]));
  return {R, G, B, A, I: rows.map(row => row[0]), labels: rows.map(row => row[1].title)};
}

// The second volume minus the first, voxel by voxel; null where they do not lie on one grid.
export function difference(first, second) {
  const same = String(first.dims) === String(second.dims) && String(first.hdr.affine) === String(second.hdr.affine);
  if (!same) return null;
  const made = first.clone();
  const scaled = volume => [volume.hdr.scl_slope || 1, volume.hdr.scl_inter || 0];
  const [[a, a0], [b, b0]] = [scaled(first), scaled(second)];
  const voxels = new Float32Array(first.img.length);
  for (let i = 0; i < voxels.length; i++) voxels[i] = second.img[i] * b + b0 - first.img[i] * a - a0;
  Object.assign(made.hdr, {datatypeCode: 16, numBitsPerVoxel: 32, scl_slope: 1, scl_inter: 0, cal_min: 0, cal_max: 0});
  made.img = voxels;
  made.calMinMax();
  return made;
}
