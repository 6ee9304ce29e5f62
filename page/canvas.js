// The canvas: drawing, choosing, undoing; what passes to and from the server.

const root = element.querySelector(".ms");
const $ = (selector) => root.querySelector(selector);
const stage = $(".stage");
const STARTS = {
  "two columns": [[0.05, 0.2, 0.45, 0.9], [0.55, 0.2, 0.95, 0.9]],
  "three columns": [[0.03, 0.3, 0.31, 0.9], [0.36, 0.3, 0.64, 0.9], [0.69, 0.3, 0.97, 0.9]],
  "two rows": [[0.25, 0.05, 0.75, 0.48], [0.25, 0.52, 0.75, 0.95]],
  "one above two": [[0.3, 0.05, 0.7, 0.45], [0.06, 0.53, 0.46, 0.95], [0.54, 0.53, 0.94, 0.95]],
  "front and back": [[0.08, 0.08, 0.6, 0.78], [0.42, 0.42, 0.94, 0.96]],
  "four corners": [[0.05, 0.05, 0.46, 0.46], [0.54, 0.05, 0.95, 0.46], [0.05, 0.54, 0.46, 0.95], [0.54, 0.54, 0.95, 0.95]],
}; // prettier-ignore
const MOST_REGIONS = 24;
const USERS = ["size", "prompt", "negative_prompt", "regions", "underlay"];

let page = { size: [512, 512], prompt: "", negative_prompt: "", regions: [], underlay: null, revision: 0 };
let offers = { sizes: [], subjects: [], loras: [], adapters: 0 };
let problems = [];
let picked = null; // what the next region is: {subject} or {phrase}
let chosen = null; // id of the chosen region
let tool = "box";
let isArmed = false; // the next drag draws, whatever lies under it
let drag = null;
let [past, future] = [[], []];
let settled = ""; // the regions when a change was last finished
let timer = null;
const open = new Set(); // ids of regions whose fields are shown

const regionOf = (id) => page.regions.find((region) => region.id === id) ?? null;
const isPainted = (region) => Boolean(region.shape && !edges(region.shape));

// --- to and from the server ------------------------------------------------------------------------------------------

function send(isTyped) {
  clearTimeout(timer);
  page.revision += 1;
  if (!isTyped) settled = snapshot();
  if (isTyped) timer = setTimeout(sendNow, 200);
  else sendNow();
}

function sendNow() {
  props.value = copy(page); // Gradio sends it with its `change` event
}

/** The user changed something: `isTyped` in a field that must keep its focus. */
function changed(isTyped = false) {
  if (isTyped) redrawStage(), redrawNotes();
  else redraw();
  send(isTyped);
}

const snapshot = () => JSON.stringify({ regions: page.regions, size: page.size });

function remember(state = snapshot()) {
  past.push(state);
  if (past.length > 100) past.shift();
  future = [];
}

function step(from, to) {
  if (!from.length) return;
  to.push(snapshot());
  Object.assign(page, JSON.parse(from.pop()));
  if (!regionOf(chosen)) chosen = null;
  changed();
}

/** A document was loaded: it takes the place of what is there. */
function take() {
  const value = props.value ?? {};
  if (page.revision) remember(settled);
  for (const key of USERS) if (value[key] !== undefined) page[key] = copy(value[key]);
  page.regions = page.regions.map(completed);
  page.revision += 1;
  [chosen, picked, settled] = [null, nextPick(), snapshot()];
  redraw();
  if (page.revision > 1) sendNow();
}

/** There are other subjects, LoRAs or sizes to choose from. */
function takeOffers() {
  offers = { ...offers, ...copy(props.offers ?? {}) };
  if (!picked || !isOffered(picked)) picked = nextPick();
  redraw();
}

/** What is wrong, or a picture to lie under the regions: what is pressed or typed in just now stays where it is. */
function takeNotes() {
  problems = copy(props.problems ?? []);
  redrawNotes();
}
function takeUnderlay() {
  if (!props.underlay?.url) return;
  page.underlay = props.underlay.url;
  redrawTools();
  redrawStage();
  send();
}

/** A region with all its keys. */
function completed(region) {
  const empty = { subject: null, phrase: null, occurrence: null, shape: null, off: false, prompt: null };
  for (const [key] of NUMBERS) empty[key] = null;
  return { id: freshId(), ...empty, negative_prompt: null, lora: null, picture: null, ...region };
}

let lastId = 0;
function freshId() {
  do lastId += 1;
  while (page.regions.some((region) => region.id === `r${lastId}`));
  return `r${lastId}`;
}

const isOffered = (pick) => Boolean(pick.phrase) || offers.subjects.some((subject) => subject.name === pick.subject);

/** A subject that has no region yet, those of the prompt first. */
function nextPick() {
  const names = offers.subjects.map((subject) => subject.name);
  const free = names.filter((name) => !page.regions.some((region) => region.subject === name));
  const inPrompt = free
    .filter((name) => page.prompt.includes(`<${name}>`))
    .sort((a, b) => page.prompt.indexOf(`<${a}>`) - page.prompt.indexOf(`<${b}>`));
  const name = inPrompt[0] ?? free[0] ?? names[0];
  return name ? { subject: name } : null;
}

function add(region) {
  if (page.regions.length >= MOST_REGIONS) {
    hint(`${MOST_REGIONS} regions are the most.`);
    return null;
  }
  const added = completed({ ...region, id: freshId() });
  page.regions.push(added);
  chosen = added.id;
  return added;
}

// --- drawing the page ------------------------------------------------------------------------------------------------

function redraw() {
  redrawChips();
  redrawTools();
  redrawStage();
  redrawList();
  redrawNotes();
}

const colours = () => coloursOf([...page.regions.map(nameOf), ...offers.subjects.map((subject) => subject.name)]);

function hint(text) {
  $(".hint").textContent = text;
}

function redrawChips() {
  const hues = colours();
  const words = $(".chips input")?.value ?? "";
  const chips = offers.subjects.map((subject) => {
    const chip = button(subject.name, `${subject.name}, a ${subject.class_phrase}: press, then drag its place`, (event) =>
      pick({ subject: subject.name }, event.detail === 0),
    );
    chip.classList.add("chip");
    chip.dataset.subject = subject.name;
    chip.style.setProperty("--c", hues.get(subject.name));
    chip.setAttribute("aria-pressed", String(picked?.subject === subject.name));
    if (/^data:image\/png;base64,/.test(subject.thumbnail ?? "")) {
      const image = make("img");
      image.src = subject.thumbnail;
      image.alt = "";
      chip.prepend(image);
    }
    return chip;
  });
  const field = make("input");
  Object.assign(field, { type: "text", placeholder: "or words: red ball", value: words, maxLength: 200 });
  field.setAttribute("aria-label", "Words of the prompt to place: type them, then drag their place");
  field.onkeydown = (event) => {
    if (event.key === "Enter" && field.value.trim()) event.preventDefault(), pick({ phrase: field.value.trim() }, true);
  };
  field.oninput = () => {
    picked = field.value.trim() ? { phrase: field.value.trim() } : nextPick();
    [isArmed, chosen] = [true, null];
    for (const chip of root.querySelectorAll(".chips .chip"))
      chip.setAttribute("aria-pressed", String(picked?.subject === chip.dataset.subject));
    redrawStage();
  };
  $(".chips").replaceChildren(...chips, field);
  $(".names").replaceChildren(
    ...offers.subjects.map((subject) =>
      button(`<${subject.name}>`, `Put <${subject.name}> into the prompt`, () => insert(`<${subject.name}>`)),
    ),
  );
}

function pick(what, isByKey) {
  picked = what;
  [isArmed, chosen] = [true, null];
  if (tool === "eraser") tool = "box";
  if (isByKey) {
    remember();
    const shift = 0.04 * (page.regions.length % 6);
    if (add({ ...what, shape: { box: [0.3, 0.3, 0.7, 0.7].map((value) => round(value + shift)) } })) afterAdding();
    changed();
    stage.focus({ preventScroll: true });
  } else redraw();
}

function afterAdding() {
  isArmed = false;
  picked = nextPick();
  const field = $(".chips input");
  if (field) field.value = "";
}

function redrawTools() {
  for (const each of root.querySelectorAll("[data-tool]"))
    each.setAttribute("aria-pressed", String(each.dataset.tool === tool));
  $(".brush-width").hidden = tool !== "brush" && tool !== "eraser";
  $("[data-do=undo]").disabled = !past.length;
  $("[data-do=redo]").disabled = !future.length;
  $("[data-do=clear]").disabled = !page.regions.length;
  $("[data-do=bare]").hidden = !page.underlay;
  const size = $(".size");
  const sizes = offers.sizes.map(({ size, label }) => [size.join("x"), `${label}  ${size.join(" × ")}`]);
  const now = page.size.join("x");
  if (!sizes.some(([value]) => value === now)) sizes.push([now, page.size.join(" × ")]);
  size.replaceChildren(...sizes.map(([value, label]) => new Option(label, value)));
  size.value = now;
}

function redrawStage() {
  const [width, height] = page.size;
  stage.style.aspectRatio = `${width} / ${height}`;
  const under = picture(page.underlay, redrawStage);
  stage.style.backgroundImage = under ? `url("${page.underlay}")` : "";
  stage.classList.toggle("fine", Boolean(under) && under.naturalWidth < 256);
  const hues = colours();
  const layers = [];
  for (const region of page.regions) {
    if (!region.shape) continue;
    const colour = hues.get(nameOf(region));
    let box = edges(region.shape);
    const layer = box ? make("div", "layer shape") : painted(region, colour);
    layer.classList.toggle("ellipse", Boolean(region.shape.ellipse));
    layer.classList.toggle("off", region.off);
    layer.classList.toggle("chosen", Boolean(box) && region.id === chosen);
    layer.dataset.id = region.id;
    layer.style.setProperty("--c", colour);
    if (box) place(layer, box);
    else box = layer.extent;
    layers.push(layer);
    if (!box) continue;
    if (region.id === chosen && isPainted(region)) layers.push(place(make("div", "frame-box"), box));
    const label = make("span", "label", nameOf(region) + (region.off ? " (off)" : ""));
    label.style.setProperty("--c", colour);
    label.style.left = `${Math.min(box[0], 0.9) * 100}%`;
    label.style.top = `${Math.min(box[1], 0.94) * 100}%`;
    label.style.maxWidth = `${(1 - Math.min(box[0], 0.9)) * 100}%`;
    layers.push(label);
  }
  const region = regionOf(chosen);
  const box = region?.shape && edges(region.shape);
  if (box && tool !== "brush" && tool !== "eraser")
    for (const grip of ["nw", "n", "ne", "e", "se", "s", "sw", "w"]) {
      const made = make("i", "grip");
      made.dataset.grip = grip;
      const [x, y] = [grip.includes("w") ? box[0] : grip.includes("e") ? box[2] : (box[0] + box[2]) / 2,
        grip.includes("n") ? box[1] : grip.includes("s") ? box[3] : (box[1] + box[3]) / 2]; // prettier-ignore
      Object.assign(made.style, { left: `${x * 100}%`, top: `${y * 100}%`, cursor: `${grip}-resize` });
      layers.push(made);
    }
  $(".layers").replaceChildren(...layers);
}

function place(made, [a, b, c, d]) {
  const percent = (value) => `${value * 100}%`;
  Object.assign(made.style, { left: percent(a), top: percent(b), width: percent(c - a), height: percent(d - b) });
  return made;
}

/** A painted region in its colour, with its `extent`. */
function painted(region, colour) {
  const canvas = rastered(region.shape, page.size, redrawStage);
  canvas.extent = extent(canvas);
  const context = canvas.getContext("2d");
  context.globalCompositeOperation = "source-in";
  context.fillStyle = colour;
  context.fillRect(0, 0, canvas.width, canvas.height);
  canvas.className = "layer painted";
  if (drag?.region === region && drag.offset) {
    const [dx, dy] = drag.offset;
    canvas.style.transform = `translate(${dx * 100}%, ${dy * 100}%)`;
    canvas.extent = canvas.extent && canvas.extent.map((value, index) => value + (index % 2 ? dy : dx));
  }
  return canvas;
}

const host = {
  state: () => ({ ...offers, open, count: page.regions.length }),
  redraw,
  file: choosePicture,
  change(region, isTyped) {
    if (!isTyped) remember(settled);
    changed(isTyped);
  },
  choose(region) {
    if (chosen === region.id) return;
    [chosen, isArmed] = [region.id, false];
    redrawStage();
    markChosen();
  },
  act(name, region, id) {
    const at = page.regions.indexOf(region);
    remember();
    if (name === "delete") page.regions.splice(at, 1);
    else if (name === "front") page.regions.splice(at + 1, 0, page.regions.splice(at, 1)[0]);
    else if (name === "back") page.regions.splice(at - 1, 0, page.regions.splice(at, 1)[0]);
    else if (name === "duplicate") duplicate(region);
    else if (name === "before" && regionOf(id) && id !== region.id) {
      const dropped = regionOf(id);
      page.regions = page.regions.filter((other) => other !== dropped);
      page.regions.splice(page.regions.indexOf(region) + 1, 0, dropped); // in front of it
    }
    if (!regionOf(chosen)) chosen = null;
    changed();
    if (name === "front" || name === "back")
      $(`.region[data-id="${CSS.escape(region.id)}"] [title^="${name === "front" ? "Bring" : "Send"}"]`)?.focus();
  },
};

function duplicate(region) {
  const shape = region.shape && copy(region.shape);
  const box = shape && edges(shape);
  add({ ...copy(region), shape: box ? withEdges(shape, moved(box, 0.06, 0.06)) : shape && shifted(shape, 0.06, 0.06, page.size) });
}

function redrawList() {
  const list = $(".regions");
  const focused = list.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
  const hues = colours();
  const items = page.regions.map((region, index) => {
    const item = listEntry(region, index + 1, host);
    item.style.setProperty("--c", hues.get(nameOf(region)));
    return item;
  });
  items.reverse();
  list.replaceChildren(...(items.length ? items : [make("li", "empty", "No regions yet. Pick a subject above and drag its place on the picture.")]));
  if (focused) list.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
  markChosen();
}

function markChosen() {
  for (const item of root.querySelectorAll(".region")) item.classList.toggle("chosen", item.dataset.id === chosen);
}

/** All that follows from what was typed: problems, colours, one-line summaries, the prompt's fields, the hint. */
function redrawNotes() {
  const hues = colours();
  for (const item of root.querySelectorAll(".region")) {
    const region = regionOf(item.dataset.id);
    if (!region) continue;
    item.style.setProperty("--c", hues.get(nameOf(region)));
    item.querySelector(".holds").textContent = holdings(region);
    const notes = problems.filter((problem) => problem.region === region.id).map(noteOf);
    if (region.subject && !page.prompt.includes(`<${region.subject}>`) && !region.prompt && notes.length)
      notes.at(-1).append(button("Name it", `Put <${region.subject}> into the prompt`, () => insert(`<${region.subject}>`)));
    item.querySelector(".problems").replaceChildren(...notes);
  }
  const ids = new Set(page.regions.map((region) => region.id));
  root
    .querySelector(":scope > .problems")
    .replaceChildren(...problems.filter((problem) => !ids.has(problem.region)).map(noteOf));
  for (const [selector, key] of [[".prompt", "prompt"], [".negative", "negative_prompt"]]) {
    const area = $(selector);
    if (area !== document.activeElement && area.value !== page[key]) area.value = page[key];
  } // prettier-ignore
  if (tool === "eraser") hint(chosen ? "Rub out parts of the chosen region." : "Choose a region to rub parts of it out.");
  else if (tool === "brush")
    hint(chosen ? "Paint: it is added to the chosen region." : picked ? `Paint where ${picked.subject ?? `“${picked.phrase}”`} stands.` : "");
  else if (chosen) hint("Drag to move it, its corners to resize it. Press a subject to draw another.");
  else hint(picked ? `Drag where ${picked.subject ?? `“${picked.phrase}”`} stands.` : "Type words of the prompt above, then drag their place.");
}

const noteOf = (problem) => make("li", problem.severity === "error" ? "problem error" : "problem", problem.text);

/** Put a subject's name into the prompt: at the caret, or behind the last one that is there. */
function insert(name) {
  const area = $(".prompt");
  const isEditing = area.dataset.caret !== undefined && area.value === page.prompt;
  const text = page.prompt;
  const last = text.lastIndexOf(">");
  if (isEditing) {
    const at = Number(area.dataset.caret);
    page.prompt = `${text.slice(0, at)}${at && !/\s$/.test(text.slice(0, at)) ? " " : ""}${name}${/^[\s,.]|^$/.test(text.slice(at)) ? "" : " "}${text.slice(at)}`;
  } else if (last >= 0) page.prompt = `${text.slice(0, last + 1)} and ${name}${text.slice(last + 1)}`;
  else page.prompt = `${text.trim() || "a photo of"} ${name}`;
  delete area.dataset.caret;
  area.value = page.prompt;
  changed();
}

// --- pointer ---------------------------------------------------------------------------------------------------------

/** Where a pointer is, in fractions of the picture. */
function at(event) {
  const { left, top, width, height } = stage.getBoundingClientRect();
  return [(event.clientX - left) / width, (event.clientY - top) / height];
}

/** The topmost region at a point; the chosen one before others. */
function hit([x, y]) {
  const isIn = (region) => {
    if (!region?.shape) return false;
    const box = edges(region.shape);
    if (box) {
      const [a, b, c, d] = box;
      if (region.shape.box) return a <= x && x <= c && b <= y && y <= d;
      return ((2 * x - a - c) / (c - a)) ** 2 + ((2 * y - b - d) / (d - b)) ** 2 <= 1;
    }
    const canvas = rastered(region.shape, page.size);
    const pixel = canvas.getContext("2d").getImageData(clamp(x) * (canvas.width - 1), clamp(y) * (canvas.height - 1), 1, 1);
    return pixel.data[3] > 127;
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
  else if (grip) drag = { kind: "resize", grip, region: regionOf(chosen), from };
  else if (under) {
    chosen = under.id;
    drag = { kind: "move", region: under, from };
  } else if (picked) {
    const [x, y] = from.map((value) => clamp(value));
    const region = add({ ...picked, shape: { [tool]: [x, y, x, y] } });
    drag = region && { kind: "draw", region, from: [x, y] };
  }
  if (drag) drag.start = copy(drag.region.shape);
  else {
    past.pop();
    chosen = tool === "box" || tool === "ellipse" ? null : chosen;
  }
  redrawStage();
  markChosen();
});

function startStroke([x, y]) {
  let region = regionOf(chosen);
  if (tool === "eraser" && !region?.shape) {
    region = hit([x, y]);
    if (!region) return null;
    chosen = region.id;
  }
  if (!region?.shape) region = picked && add({ ...picked, shape: { strokes: [] } });
  if (!region) return null;
  const width = Number($(".brush-width input").value) / 100;
  const stroke = { erase: tool === "eraser", width, points: [[x, y].map((value) => round(clamp(value, -0.9, 1.9)))] };
  const drawn = { kind: "paint", region, stroke };
  if (region.shape.strokes) region.shape.strokes.push(stroke);
  else {
    drawn.canvas = rastered(region.shape, page.size); // boxes and masks that are painted over become masks
    paintStrokes(drawn.canvas.getContext("2d"), [stroke], [drawn.canvas.width, drawn.canvas.height]);
    region.shape = asMask(drawn.canvas);
  }
  return drawn;
}

stage.addEventListener("pointermove", (event) => {
  if (!drag) return;
  let [x, y] = at(event);
  const { region, kind, start, from } = drag;
  if (kind === "paint") {
    drag.stroke.points.push([x, y].map((value) => round(clamp(value, -0.9, 1.9))));
    if (drag.canvas) {
      const { canvas, stroke } = drag;
      paintStrokes(canvas.getContext("2d"), [{ ...stroke, points: stroke.points.slice(-2) }], [canvas.width, canvas.height]);
      region.shape = asMask(canvas);
    }
  } else if (kind === "draw") {
    const box = between(from, [clamp(x), clamp(y)]);
    region.shape = withEdges(region.shape, snapped(box, `${y < from[1] ? "n" : "s"}${x < from[0] ? "w" : "e"}`, event));
  } else {
    const [dx, dy] = [x - from[0], y - from[1]];
    if (isPainted(region)) drag.offset = [dx, dy];
    else {
      const box = edges(start);
      const next = kind === "move" ? moved(box, dx, dy) : resized(box, drag.grip, dx, dy);
      region.shape = withEdges(start, snapped(next, kind === "move" ? "" : drag.grip, event));
    }
  }
  redrawStage();
});

/** A box whose moved edges catch on the picture's and on other regions' edges and middles; the empty grip moves all. */
function snapped(box, grip, event) {
  $(".guides").replaceChildren();
  if (!$(".snap").checked || event.altKey) return box;
  const { width, height } = stage.getBoundingClientRect();
  const others = page.regions.filter((region) => region !== drag.region && region.shape && edges(region.shape));
  const result = [...box];
  for (const axis of [0, 1]) {
    const reach = 7 / (axis ? height : width);
    const lines = [0, 0.5, 1];
    for (const { shape } of others) {
      const other = edges(shape);
      lines.push(other[axis], (other[axis] + other[axis + 2]) / 2, other[axis + 2]);
    }
    const [low, high] = [box[axis], box[axis + 2]];
    const free = grip ? [grip.includes("nw"[1 - axis]) && low, grip.includes("se"[axis ? 0 : 1]) && high] : [low, (low + high) / 2, high];
    for (const value of free) {
      if (value === false) continue;
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
  const { kind, region, offset, start } = drag;
  drag = null;
  $(".guides").replaceChildren();
  if (event.type === "pointercancel") return step(past, []);
  const box = edges(region.shape);
  if (kind === "draw") {
    if (box[2] - box[0] < SMALLEST || box[3] - box[1] < SMALLEST) {
      page.regions = page.regions.filter((other) => other !== region); // a press, not a drag
      [chosen] = [null];
      past.pop();
      return redraw();
    }
    afterAdding();
  } else if (kind === "paint") {
    if (region.shape.strokes?.length === 1) afterAdding();
    isArmed = false;
  } else if (offset && (offset[0] || offset[1])) region.shape = shifted(region.shape, ...offset, page.size);
  if (kind !== "paint" && !offset && JSON.stringify(region.shape) === JSON.stringify(start)) {
    past.pop(); // it was only chosen
    return redraw();
  }
  changed();
}
stage.addEventListener("pointerup", finish);
stage.addEventListener("pointercancel", finish);

// --- keys and buttons ------------------------------------------------------------------------------------------------

root.addEventListener("keydown", (event) => {
  const isField = /INPUT|TEXTAREA|SELECT/.test(event.target.tagName);
  const key = event.key.toLowerCase();
  const isCommand = event.ctrlKey || event.metaKey;
  const region = regionOf(chosen);
  let isTaken = true;
  if (isField) return;
  if (isCommand && key === "z") event.shiftKey ? step(future, past) : step(past, future);
  else if (isCommand && key === "y") step(future, past);
  else if (isCommand && key === "d" && region) host.act("duplicate", region);
  else if (event.target !== stage || !region) isTaken = false;
  else if (key === "delete" || key === "backspace") host.act("delete", region);
  else if (key === "escape") (chosen = null), redraw();
  else if (key === "]" && page.regions.at(-1) !== region) host.act("front", region);
  else if (key === "[" && page.regions[0] !== region) host.act("back", region);
  else if (key.startsWith("arrow") && region.shape) nudge(region, key, event);
  else isTaken = false;
  if (isTaken) {
    event.preventDefault();
    event.stopPropagation();
    if (event.target === stage) stage.focus({ preventScroll: true });
  }
});

function nudge(region, key, { shiftKey, ctrlKey, metaKey }) {
  const length = ctrlKey || metaKey ? 0.05 : 0.01;
  const [dx, dy] = { arrowleft: [-1, 0], arrowright: [1, 0], arrowup: [0, -1], arrowdown: [0, 1] }[key].map((v) => v * length);
  remember();
  const box = edges(region.shape);
  if (!box) region.shape = shifted(region.shape, dx, dy, page.size);
  else region.shape = withEdges(region.shape, shiftKey ? resized(box, "se", dx, dy) : moved(box, dx, dy));
  changed();
}

for (const each of root.querySelectorAll("[data-tool]"))
  each.onclick = () => {
    tool = each.dataset.tool;
    isArmed = tool !== "eraser" && !chosen;
    redrawTools();
    redrawStage();
    redrawNotes();
  };

const ACTIONS = {
  undo: () => step(past, future),
  redo: () => step(future, past),
  clear() {
    remember();
    [page.regions, chosen] = [[], null];
    picked = nextPick();
    changed();
  },
  bare() {
    page.underlay = null;
    changed();
  },
};
for (const each of root.querySelectorAll("[data-do]")) each.onclick = ACTIONS[each.dataset.do];

$(".size").onchange = () => {
  remember();
  page.size = $(".size").value.split("x").map(Number);
  changed();
};
for (const [selector, key] of [[".prompt", "prompt"], [".negative", "negative_prompt"]]) {
  const area = $(selector);
  area.oninput = () => {
    page[key] = area.value;
    changed(true);
  };
  area.onblur = () => (area.dataset.caret = area.selectionStart);
} // prettier-ignore

// Starting layouts: the regions that are there keep what they are, others come for subjects that have none.
for (const [name, boxes] of Object.entries(STARTS)) {
  const made = button("", `Starting layout: ${name}`, () => {
    remember();
    boxes.forEach((box, index) => {
      const region = page.regions[index];
      if (region) region.shape = { box };
      else add({ ...(nextPick() ?? {}), shape: { box } });
    });
    chosen = null;
    picked = nextPick();
    isArmed = false;
    changed();
  });
  made.dataset.start = name;
  const space = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(space, "svg");
  drawing.setAttribute("viewBox", "0 0 28 28");
  for (const [a, b, c, d] of boxes) {
    const rect = document.createElementNS(space, "rect");
    const values = { x: 28 * a, y: 28 * b, width: 28 * (c - a), height: 28 * (d - b) };
    for (const [key, value] of Object.entries(values)) rect.setAttribute(key, value);
    drawing.append(rect);
  }
  made.append(drawing);
  $(".starts").append(made);
}

// --- files -----------------------------------------------------------------------------------------------------------

let wanted = null; // what the chosen file becomes: [kind, region]

function choosePicture(kind, region = null) {
  wanted = [kind, region];
  $(".picker").click();
}
for (const each of root.querySelectorAll("[data-file]")) each.onclick = () => choosePicture(each.dataset.file);

$(".picker").onchange = async () => {
  const file = $(".picker").files[0];
  $(".picker").value = "";
  if (!file || !wanted) return;
  const [kind, region] = wanted;
  try {
    const canvas = await decoded(file, kind === "mask" || kind === "map" ? RASTER : 1024);
    remember();
    if (kind === "underlay") page.underlay = canvas.toDataURL("image/png");
    else if (kind === "picture") region.picture = canvas.toDataURL("image/png");
    else if (kind === "mask") {
      const own = regionOf(chosen);
      if (own) own.shape = maskOf(canvas);
      else if (add({ ...(picked ?? {}), shape: maskOf(canvas) })) afterAdding();
    } else {
      const masks = masksOf(canvas, MOST_REGIONS - page.regions.length);
      if (!masks.length) throw new Error("That picture has one colour only; each region of a colour map has a colour of its own.");
      for (const shape of masks) add({ ...(nextPick() ?? {}), shape });
      picked = nextPick();
    }
    changed();
  } catch (error) {
    hint(error.message);
  }
};

watch("value", take);
watch("offers", takeOffers);
watch("problems", takeNotes);
watch("underlay", takeUnderlay);
takeOffers();
take();
takeNotes();
