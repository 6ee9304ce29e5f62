// The picture and the regions over it: how they are drawn, and what the pointer does there.

const GRIPS = ["nw", "n", "ne", "e", "se", "s", "sw", "w"];
const CRAMPED = 44; // pixels: grips of a smaller side stand outside of it

// --- drawing ---------------------------------------------------------------------------------------------------------

function redrawStage() {
  const [width, height] = page.size;
  stage.style.aspectRatio = `${width} / ${height}`;
  stage.style.setProperty("--ratio", width / height);
  stage.dataset.tool = tool;
  const under = picture(page.underlay, redrawStage);
  stage.style.backgroundImage = under ? `url("${page.underlay}")` : "";
  stage.classList.toggle("fine", Boolean(under) && under.naturalWidth < 256);
  const looks = colours();
  const shorter = Math.min(stage.clientWidth, stage.clientHeight);
  const layers = [];
  for (const region of page.regions) {
    if (!region.shape) continue;
    const { name, colour } = looks.region(region);
    const layer = isPainted(region) ? painted(region, colour) : place(make("div", "layer shape"), edges(region.shape));
    layer.classList.toggle("ellipse", Boolean(region.shape.ellipse));
    layer.classList.toggle("off", region.off);
    layer.classList.toggle("chosen", !isPainted(region) && region.id === chosen);
    layer.dataset.id = region.id;
    layer.classList.toggle("soft", Boolean(region.feather));
    if (region.feather) layer.style.setProperty("--blur", `${region.feather * shorter}px`);
    tint(layer, colour);
    layers.push(layer);
    const box = extentOf(region);
    if (!box) continue;
    if (region.id === chosen && isPainted(region)) layers.push(place(make("div", "frame-box"), box));
    const label = tint(make("span", "label", name + (region.off ? " (off)" : "")), colour);
    label.style.left = `${Math.min(box[0], 0.9) * 100}%`;
    label.style.top = `${Math.min(box[1], 0.94) * 100}%`;
    label.style.maxWidth = `${(1 - Math.min(box[0], 0.9)) * 100}%`;
    layers.push(label);
  }
  $(".layers").replaceChildren(...layers, ...gripsOf(regionOf(chosen)));
}

function gripsOf(region) {
  const box = region && extentOf(region);
  if (!box || tool === "brush" || tool === "eraser") return [];
  const out = [0, 1].map((axis) => ((box[axis + 2] - box[axis]) * [stage.clientWidth, stage.clientHeight][axis] < CRAMPED ? 9 : 0));
  return GRIPS.map((grip) => {
    const made = make("i", "grip");
    made.dataset.grip = grip;
    const [x, y] = [grip.includes("e") - grip.includes("w"), grip.includes("s") - grip.includes("n")]; // -1, 0 or 1
    made.style.left = `calc(${50 * (box[0] + box[2] + x * (box[2] - box[0]))}% + ${x * out[0]}px)`;
    made.style.top = `calc(${50 * (box[1] + box[3] + y * (box[3] - box[1]))}% + ${y * out[1]}px)`;
    made.style.cursor = `${grip}-resize`;
    return made;
  });
}

function place(made, [a, b, c, d]) {
  const percent = (value) => `${value * 100}%`;
  Object.assign(made.style, { left: percent(a), top: percent(b), width: percent(c - a), height: percent(d - b) });
  return made;
}

const rasters = new Map(); // id -> the painted shape as it was last drawn: {key, canvas, box}

/** A painted region's shape as a canvas, opaque inside, and its edges. What has not changed is not painted again. */
function raster(region) {
  if (drag?.canvas && drag.region === region) return { canvas: drag.canvas, box: extent(drag.canvas) };
  const key = JSON.stringify([page.size, region.shape]);
  const known = rasters.get(region.id);
  if (known?.key === key) return known;
  const canvas = rastered(region.shape, page.size, redrawStage);
  if (rasters.size > 2 * MOST_REGIONS) rasters.clear();
  const made = { key, canvas, box: extent(canvas) };
  if (!region.shape.mask || picture(region.shape.mask)) rasters.set(region.id, made);
  else if (known) return known; // until the new mask is decoded
  return made;
}

/** Where a region is: the edges of a box, an ellipse or of what is painted; null where nothing is. */
function extentOf(region) {
  if (drag?.region === region && drag.to) return drag.to;
  return region.shape && (edges(region.shape) ?? raster(region).box);
}

/** What is painted of a region, in its colour; while it is dragged, where it is dragged to. */
function painted(region, colour) {
  const source = raster(region);
  const { canvas, box } = source;
  if (!box) return make("canvas", "layer painted");
  if (source.colour !== colour || drag?.canvas === canvas) {
    const [x, y] = [box[0] * canvas.width, box[1] * canvas.height];
    const shown = blank([box[2] * canvas.width - x, box[3] * canvas.height - y].map(Math.round));
    const context = shown.getContext("2d");
    context.drawImage(canvas, -x, -y);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = colour;
    context.fillRect(0, 0, shown.width, shown.height);
    Object.assign(source, { colour, shown });
  }
  source.shown.className = "layer painted";
  return place(source.shown, extentOf(region));
}

/** The ring that shows how wide the brush is. */
function redrawTip(event) {
  const tip = $(".tip");
  tip.hidden = !event || event.pointerType === "touch" || (tool !== "brush" && tool !== "eraser");
  if (tip.hidden) return;
  const [x, y] = at(event);
  const side = brushWidth() * Math.min(stage.clientWidth, stage.clientHeight);
  Object.assign(tip.style, { left: `${x * 100}%`, top: `${y * 100}%`, width: `${side}px`, height: `${side}px` });
}

// --- pointer ---------------------------------------------------------------------------------------------------------

const brushWidth = () => Number($(".brush-width input").value) / 100;

/** Where a pointer is, in fractions of the picture. */
function at(event) {
  const { left, top, width, height } = stage.getBoundingClientRect();
  return [(event.clientX - left) / width, (event.clientY - top) / height];
}

/** The topmost region at a point; the chosen one before others. */
function hit([x, y]) {
  const isIn = (region) => {
    if (!region?.shape) return false;
    const box = extentOf(region);
    if (!box || x < box[0] || y < box[1] || x > box[2] || y > box[3]) return false;
    if (region.shape.box) return true;
    if (region.shape.ellipse)
      return ((2 * x - box[0] - box[2]) / (box[2] - box[0])) ** 2 + ((2 * y - box[1] - box[3]) / (box[3] - box[1])) ** 2 <= 1;
    const { canvas } = raster(region);
    return canvas.getContext("2d").getImageData(x * (canvas.width - 1), y * (canvas.height - 1), 1, 1).data[3] > 127;
  };
  const own = regionOf(chosen);
  return isIn(own) ? own : ([...page.regions].reverse().find(isIn) ?? null);
}

stage.addEventListener("pointerdown", (event) => {
  if (event.button || drag) return;
  event.preventDefault();
  stage.setPointerCapture(event.pointerId);
  stage.focus({ preventScroll: true });
  const from = at(event);
  const grip = event.target.dataset?.grip;
  const under = isArmed ? null : hit(from);
  remember();
  if (tool === "brush" || tool === "eraser") drag = startStroke(from);
  else if (grip) drag = startFit("resize", regionOf(chosen), from, grip);
  else if (under) {
    chosen = under.id;
    drag = startFit("move", under, from, "");
  } else if (picked) {
    const [x, y] = from.map((value) => clamp(value));
    const region = add({ ...picked, shape: { [tool]: [x, y, x, y] } });
    drag = region && { kind: "draw", region, from: [x, y] };
  }
  if (!drag) {
    past.pop();
    chosen = tool === "box" || tool === "ellipse" ? null : chosen;
  }
  redrawStage();
  redrawWords(); // not the hint: what changed its height would move the picture under the pointer
  markChosen();
});

const isDecoded = (region) => !region.shape?.mask || Boolean(picture(region.shape.mask));

const startFit = (kind, region, from, grip) => isDecoded(region) && { kind, region, from, grip, box: extentOf(region) };

function startStroke([x, y]) {
  let region = regionOf(chosen);
  if (tool === "eraser" && !region?.shape) {
    region = hit([x, y]);
    if (!region) return null;
    chosen = region.id;
  }
  if (!region?.shape) region = picked && add({ ...picked, shape: { strokes: [] } });
  if (!region || !isDecoded(region)) return null;
  const stroke = { erase: tool === "eraser", width: brushWidth(), points: [[x, y].map(onPaper)] };
  const started = { kind: "paint", region, stroke };
  if (region.shape.strokes) region.shape.strokes.push(stroke);
  else {
    started.canvas = rastered(region.shape, page.size); // boxes and masks that are painted over become masks
    paintStrokes(started.canvas.getContext("2d"), [stroke], [started.canvas.width, started.canvas.height]);
    region.shape = { mask: "" };
  }
  return started;
}

const onPaper = (value) => round(clamp(value, -0.9, 1.9));

stage.addEventListener("pointermove", (event) => {
  redrawTip(event);
  if (!drag) return;
  const [x, y] = at(event);
  const { region, kind, from, box, grip } = drag;
  if (kind === "paint") {
    const { canvas, stroke } = drag;
    for (const each of event.getCoalescedEvents?.() ?? []) stroke.points.push(at(each).map(onPaper));
    stroke.points.push([x, y].map(onPaper));
    if (canvas) paintStrokes(canvas.getContext("2d"), [stroke], [canvas.width, canvas.height]);
  } else if (kind === "draw") {
    const drawn = between(from, [clamp(x), clamp(y)]);
    region.shape = withEdges(region.shape, snapped(drawn, `${y < from[1] ? "n" : "s"}${x < from[0] ? "w" : "e"}`, event));
  } else {
    const [dx, dy] = [x - from[0], y - from[1]];
    drag.to = snapped(grip ? resized(box, grip, dx, dy) : moved(box, dx, dy), grip, event);
    if (!isPainted(region)) region.shape = withEdges(region.shape, drag.to);
  }
  redrawStage();
});
stage.addEventListener("pointerleave", () => redrawTip(null));

/** A box whose moved edges catch on the picture's and on other regions' edges and middles; the empty grip moves all. */
function snapped(box, grip, event) {
  $(".guides").replaceChildren();
  if (!$(".snap").checked || event.altKey) return box;
  const { width, height } = stage.getBoundingClientRect();
  const others = page.regions.filter((region) => region !== drag.region).map(extentOf).filter(Boolean); // prettier-ignore
  const result = [...box];
  for (const axis of [0, 1]) {
    const reach = 7 / (axis ? height : width);
    const lines = [0, 0.5, 1];
    for (const other of others) lines.push(other[axis], (other[axis] + other[axis + 2]) / 2, other[axis + 2]);
    const [low, high] = [box[axis], box[axis + 2]];
    const isFree = [grip.includes("wn"[axis]), grip.includes("es"[axis])];
    const free = grip ? [low, high].filter((_, end) => isFree[end]) : [low, (low + high) / 2, high];
    for (const value of free) {
      const line = caught(value, lines, reach);
      if (line === null) continue;
      if (!grip) [result[axis], result[axis + 2]] = [low + line - value, high + line - value];
      else if (value === low && line < high - SMALLEST) result[axis] = line;
      else if (value === high && line > low + SMALLEST) result[axis + 2] = line;
      const guide = make("i", "guide");
      Object.assign(guide.style, axis ? { top: `${line * 100}%`, left: 0, width: "100%", height: "1px" } : { left: `${line * 100}%`, top: 0, height: "100%", width: "1px" });
      $(".guides").append(guide);
      break;
    }
  }
  return result[0] < 0 || result[1] < 0 || result[2] > 1 || result[3] > 1 ? box : result;
}

function finish(event) {
  if (!drag) return;
  const done = drag;
  const { kind, region, to, box } = done;
  drag = null;
  $(".guides").replaceChildren();
  if (event.type === "pointercancel") return step(past, []);
  if (kind === "draw") {
    const [a, b, c, d] = edges(region.shape);
    if (c - a < SMALLEST || d - b < SMALLEST) {
      page.regions = page.regions.filter((other) => other !== region); // a press, not a drag
      chosen = null;
      past.pop();
      return redraw();
    }
    afterAdding();
  } else if (kind === "paint") {
    if (done.canvas) region.shape = asMask(done.canvas);
    if (region.shape.strokes?.length === 1) afterAdding();
    isArmed = false;
  } else if (!to || to.every((value, edge) => Math.abs(value - box[edge]) < 1e-4)) {
    past.pop(); // it was only chosen
    return redraw();
  } else if (isPainted(region)) region.shape = fitted(region.shape, box, to, page.size);
  changed();
}
stage.addEventListener("pointerup", finish);
stage.addEventListener("pointercancel", finish);

/** Arrow keys: move a region, with Shift its lower right corner. */
function nudge(region, key, { shiftKey, ctrlKey, metaKey }) {
  const length = ctrlKey || metaKey ? 0.05 : 0.01;
  const [dx, dy] = { arrowleft: [-1, 0], arrowright: [1, 0], arrowup: [0, -1], arrowdown: [0, 1] }[key].map((v) => v * length);
  const box = extentOf(region);
  if (!box || !isDecoded(region)) return;
  remember();
  const to = shiftKey ? resized(box, "se", dx, dy) : moved(box, dx, dy);
  region.shape = isPainted(region) ? fitted(region.shape, box, to, page.size) : withEdges(region.shape, to);
  changed();
}
