// The rest of the canvas: chips, tools, the list, keys, files.

const STARTS = {
  "two columns": [[0.05, 0.2, 0.45, 0.9], [0.55, 0.2, 0.95, 0.9]],
  "three columns": [[0.03, 0.3, 0.31, 0.9], [0.36, 0.3, 0.64, 0.9], [0.69, 0.3, 0.97, 0.9]],
  "two rows": [[0.25, 0.05, 0.75, 0.48], [0.25, 0.52, 0.75, 0.95]],
  "one above two": [[0.3, 0.05, 0.7, 0.45], [0.06, 0.53, 0.46, 0.95], [0.54, 0.53, 0.94, 0.95]],
  "front and back": [[0.08, 0.08, 0.6, 0.78], [0.42, 0.42, 0.94, 0.96]],
  "four corners": [[0.05, 0.05, 0.46, 0.46], [0.54, 0.05, 0.95, 0.46], [0.05, 0.54, 0.46, 0.95], [0.54, 0.54, 0.95, 0.95]],
}; // prettier-ignore

// --- drawing the page ------------------------------------------------------------------------------------------------

function redraw() {
  redrawChips();
  redrawTools();
  redrawStage();
  redrawList();
  redrawNotes();
}

const colours = () => looksOf(page.regions, offers.subjects);

function hint(text) {
  $(".hint").textContent = text;
}

function redrawChips() {
  const looks = colours();
  const words = $(".chips input")?.value ?? "";
  const chips = offers.subjects.map((subject) => {
    const chip = button(subject.name, `${subject.name}, a ${subject.class_phrase}: press, then drag its place`, (event) =>
      pick({ subject: subject.name }, event.detail === 0),
    );
    chip.classList.add("chip");
    chip.dataset.subject = subject.name;
    tint(chip, looks.subject(subject.name));
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
    redrawNotes();
  };
  $(".chips").replaceChildren(...chips, field);
  $(".names").replaceChildren(
    ...offers.subjects.map(({ name }) =>
      tint(button(`<${name}>`, `Put <${name}> into the prompt`, () => insert(`<${name}>`)), looks.subject(name)),
    ),
  );
}

function pick(what, isByKey) {
  picked = what;
  [isArmed, chosen] = [true, null];
  if (tool === "eraser") tool = "box";
  if (isByKey) {
    const shift = 0.04 * (page.regions.length % 6);
    const box = [0.3, 0.3, 0.7, 0.7].map((value) => round(value + shift));
    remember();
    if (!add({ ...what, shape: tool === "ellipse" ? { ellipse: box } : { box } })) return void past.pop();
    afterAdding();
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
  const isBrush = tool === "brush" || tool === "eraser";
  $(".brush-width").hidden = !isBrush;
  $(".toggle").hidden = isBrush;
  $("[data-do=undo]").disabled = !past.length;
  $("[data-do=redo]").disabled = !future.length;
  $("[data-do=clear]").disabled = !page.regions.length;
  $("[data-do=bare]").hidden = !page.underlay;
  $("[data-do=rest]").hidden = page.regions.some((region) => region.phrase === BACKGROUND && !region.shape);
  const size = $(".size");
  const sizes = offers.sizes.map(({ size, label }) => [size.join("x"), `${label}  ${size.join(" × ")}`]);
  const now = page.size.join("x");
  if (!sizes.some(([value]) => value === now)) sizes.push([now, page.size.join(" × ")]);
  size.replaceChildren(...sizes.map(([value, label]) => new Option(label, value)));
  size.value = now;
}

const host = {
  state: () => ({ ...offers, open, count: page.regions.length }),
  redraw,
  reference: (region, adapter) => choosePicture("reference", region, adapter),
  change(region, isTyped) {
    const field = isTyped ? document.activeElement : null;
    if (!field || field !== typedIn) remember(settled);
    changed(isTyped);
    typedIn = field;
  },
  choose(region) {
    if (chosen === region.id) return;
    [chosen, isArmed] = [region.id, false];
    redrawStage();
    redrawNotes();
    markChosen();
  },
  act(name, region, place) {
    const at = page.regions.indexOf(region);
    const isListed = $(".regions").contains(document.activeElement);
    remember();
    if (name === "delete") page.regions.splice(at, 1);
    else if (name === "front") page.regions.splice(at + 1, 0, page.regions.splice(at, 1)[0]);
    else if (name === "back") page.regions.splice(at - 1, 0, page.regions.splice(at, 1)[0]);
    else if (name === "duplicate") duplicate(region);
    else if (name === "move") page.regions.splice(place, 0, page.regions.splice(at, 1)[0]);
    if (!regionOf(chosen)) chosen = null;
    changed();
    if (name === "delete" && isListed) ($(".region .grab") ?? stage).focus({ preventScroll: true });
  },
};

function duplicate(region) {
  let shape = region.shape && copy(region.shape);
  const box = shape && edges(shape);
  if (box) shape = withEdges(shape, moved(box, 0.06, 0.06));
  else if (shape && extentOf(region))
    shape = fitted(shape, extentOf(region), moved(extentOf(region), 0.06, 0.06), page.size);
  if (!add({ ...copy(region), shape })) past.pop();
}

function redrawList() {
  const list = $(".regions");
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  const [focusedIn, focusedOn] = [focused?.closest(".region")?.dataset.id, focused?.dataset.field];
  const items = page.regions.map((region, index) => {
    return listEntry(region, index + 1, host);
  });
  items.reverse();
  list.replaceChildren(...(items.length ? items : [make("li", "empty", "No regions yet. Pick a subject above and drag its place on the picture.")]));
  if (focusedOn) $(`.region[data-id="${CSS.escape(focusedIn)}"] [data-field="${CSS.escape(focusedOn)}"]`)?.focus();
  markChosen();
}

function markChosen() {
  for (const item of root.querySelectorAll(".region")) item.classList.toggle("chosen", item.dataset.id === chosen);
}

/** All that follows from what was typed: problems, colours, one-line summaries, the prompt's fields, the hint. */
function redrawNotes() {
  const looks = colours();
  for (const item of root.querySelectorAll(".region")) {
    const region = regionOf(item.dataset.id);
    if (!region) continue;
    tint(item, looks.region(region).colour);
    item.querySelector(".holds").textContent = holdings(region);
    const notes = problems.filter((problem) => problem.region === region.id).map(noteOf);
    const words = region.subject ? `<${region.subject}>` : region.phrase !== BACKGROUND && region.phrase?.trim();
    const isNamed = [page.prompt, region.prompt ?? ""].some((text) => text.toLowerCase().includes(words?.toLowerCase?.()));
    if (words && !isNamed && notes.length)
      notes.at(-1).append(button("Name it", `Put ${words} into the prompt`, () => insert(words)));
    item.querySelector(".problems").replaceChildren(...notes);
  }
  const ids = new Set(page.regions.map((region) => region.id));
  $(".whole").replaceChildren(...problems.filter((problem) => !ids.has(problem.region)).map(noteOf));
  redrawWords();
  if (tool === "eraser") hint(chosen ? "Rub out parts of the chosen region." : "Choose a region to rub parts of it out.");
  else if (tool === "brush")
    hint(chosen ? "Paint: it is added to the chosen region." : picked ? `Paint where ${picked.subject ?? `“${picked.phrase}”`} stands.` : "");
  else if (chosen) hint("Drag it or its edges, or pick another subject.");
  else hint(picked ? `Drag where ${picked.subject ?? `“${picked.phrase}”`} stands.` : "Type words of the prompt above, then drag their place.");
}

/** A problem; what is long is shown as far as its first clause. */
function noteOf({ text, severity }) {
  const note = make("li", severity === "error" ? "problem error" : "problem");
  const [, head, rest] = /^(.{60,}?[;.]) (.{80,})$/s.exec(text) ?? [null, text, ""];
  note.append(head);
  if (rest) {
    const more = make("details", "", rest);
    more.prepend(make("summary", "", "More"));
    note.append(" ", more);
  }
  return note;
}

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
  else if (key === "escape" && drag) stage.dispatchEvent(new PointerEvent("pointercancel"));
  else if (event.target !== stage) isTaken = false;
  else if ((key === "enter" || key === " ") && page.regions.length) chooseNext(event.shiftKey ? 1 : -1);
  else if (!region) isTaken = false;
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

/** The next region further back, or with 1 further in front, comes to be the chosen one. */
function chooseNext(by) {
  const count = page.regions.length;
  const at = page.regions.indexOf(regionOf(chosen));
  host.choose(page.regions[at < 0 ? count - 1 : (at + by + count) % count]);
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
  rest() {
    remember();
    const region = add({ phrase: BACKGROUND });
    if (!region) return void past.pop();
    page.regions.unshift(page.regions.pop());
    open.add(region.id);
    changed();
    $(`.region[data-id="${region.id}"] [data-field=prompt]`)?.focus();
  },
};
for (const each of root.querySelectorAll("[data-do]")) each.onclick = ACTIONS[each.dataset.do];

$(".size").onchange = () => {
  remember();
  page.size = $(".size").value.split("x").map(Number);
  changed();
};

// Starting layouts: the regions that are there keep what they are, others come for subjects that have none.
for (const [name, boxes] of Object.entries(STARTS)) {
  const made = button("", `Starting layout: ${name}`, () => {
    remember();
    const placed = page.regions.filter((region) => region.shape);
    boxes.forEach((box, index) => {
      const region = placed[index];
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

let wanted = null; // what the chosen file becomes: [kind, region, number of an IP-Adapter]

function choosePicture(kind, region = null, adapter = null) {
  wanted = [kind, region, adapter];
  $(".picker").click();
}
for (const each of root.querySelectorAll("[data-file]")) each.onclick = () => choosePicture(each.dataset.file);

$(".picker").onchange = async () => {
  const file = $(".picker").files[0];
  $(".picker").value = "";
  if (!file || !wanted) return;
  const [kind, region, adapter] = wanted;
  try {
    const canvas = await decoded(file, kind === "underlay" ? 1024 : RASTER, kind !== "map");
    remember();
    if (kind === "underlay") page.underlay = canvas.toDataURL("image/png");
    else if (kind === "reference")
      region.ip_adapter_image = { ...region.ip_adapter_image, [adapter]: canvas.toDataURL("image/png") };
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
