/**
 * The picture with what lies on it, and what a person does there: clicks and boxes in pixels of the
 * upright picture.
 */

import { css, paint } from "/page/masks.js";

const DRAG_PIXELS = 4; // of the screen; less is a click
const HALO = "rgb(255 255 255 / 75%)";

export class Stage {
  /** `acted` is called with {point, sign} or {box}. */
  constructor(canvas, acted) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.acted = acted;
    this.picture = null;
    this.clear();
    this.listen();
  }

  /** Shows a picture, with nothing on it. */
  show(picture) {
    this.picture = picture;
    this.canvas.width = picture.width;
    this.canvas.height = picture.height;
    this.clear();
    this.draw();
  }

  /** Takes everything off the picture. */
  clear() {
    this.layer = null; // canvas with masks
    this.outlines = []; // {points: [[x, y], …], colour, dashed, thin}
    this.dots = []; // {point, colour}
    this.dragged = null;
  }

  /** Lays masks over the picture: [{mask, colour}, …]; `alpha` up to 255. */
  cover(masks, alpha = 110) {
    const { width, height } = this.canvas;
    this.layer = Object.assign(document.createElement("canvas"), { width, height });
    const context = this.layer.getContext("2d");
    const data = context.createImageData(width, height);
    for (const { mask, colour } of masks) paint(data.data, mask, colour, alpha);
    context.putImageData(data, 0, 0);
  }

  draw() {
    if (!this.picture) return;
    const { context, canvas } = this;
    context.drawImage(this.picture, 0, 0, canvas.width, canvas.height);
    if (this.layer) context.drawImage(this.layer, 0, 0);
    this.outlines.forEach((outline) => this.outline(outline));
    if (this.dragged) this.outline({ points: corners(this.dragged), colour: "#2b4c8c", dashed: true });
    this.dots.forEach((dot) => this.dot(dot));
  }

  /** One pixel of the screen in pixels of the picture. */
  get scale() {
    return this.canvas.width / (this.canvas.clientWidth || this.canvas.width);
  }

  outline({ points, colour, dashed = false, thin = false }) {
    const { context, scale } = this;
    context.beginPath();
    points.forEach(([x, y]) => context.lineTo(x, y));
    context.closePath();
    context.setLineDash(dashed ? [6 * scale, 4 * scale] : []);
    for (const [stroke, wide] of thin ? [[colour, 1]] : [[HALO, 4], [colour, 2]]) {
      context.strokeStyle = stroke;
      context.lineWidth = wide * scale;
      context.stroke();
    }
  }

  dot({ point: [x, y], colour }) {
    const { context, scale } = this;
    context.beginPath();
    context.arc(x, y, 5 * scale, 0, 2 * Math.PI);
    context.setLineDash([]);
    context.fillStyle = colour;
    context.strokeStyle = "white";
    context.lineWidth = 2 * scale;
    context.fill();
    context.stroke();
  }

  listen() {
    const { canvas } = this;
    let start = null;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      start = this.place(event);
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!start) return;
      const box = boxOf(start, this.place(event));
      this.dragged = this.isDrag(box) ? box : null;
      this.draw();
    });
    canvas.addEventListener("pointerup", (event) => {
      if (!start) return;
      const box = boxOf(start, this.place(event));
      const action = this.isDrag(box) ? { box } : { point: start, sign: event.shiftKey ? 0 : 1 };
      start = this.dragged = null;
      this.acted(action);
    });
    canvas.addEventListener("pointercancel", () => {
      start = this.dragged = null;
      this.draw();
    });
  }

  isDrag([x0, y0, x1, y1]) {
    return Math.min(x1 - x0, y1 - y0) > DRAG_PIXELS * this.scale;
  }

  /** Where the pointer is, in pixels of the picture. */
  place(event) {
    const { canvas } = this;
    const frame = canvas.getBoundingClientRect();
    const x = ((event.clientX - frame.left) * canvas.width) / frame.width;
    const y = ((event.clientY - frame.top) * canvas.height) / frame.height;
    return [within(x, canvas.width), within(y, canvas.height)];
  }
}

/** The corners of a box, in order. */
export function corners([x0, y0, x1, y1]) {
  return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
}

/** The outlines of an annotated car: its box in space, or the box in the picture where a corner is
 * behind the camera. The front has a halo.
 */
export function carOutlines({ corners: [...at], box }, colour) {
  if (!at.length) return [{ points: corners(box), colour, dashed: true }];
  const faces = [at.slice(0, 4), at.slice(4), [at[2], at[6]], [at[3], at[7]]];
  const front = { points: [at[0], at[1], at[5], at[4]], colour };
  return [...faces.map((points) => ({ points, colour, thin: true })), front];
}

export const signColour = (sign) => css(sign ? [63, 122, 76] : [161, 54, 31]);

function boxOf([ax, ay], [bx, by]) {
  return [Math.min(ax, bx), Math.min(ay, by), Math.max(ax, bx), Math.max(ay, by)];
}

function within(value, limit) {
  return Math.round(10 * Math.min(Math.max(value, 0), limit)) / 10;
}
