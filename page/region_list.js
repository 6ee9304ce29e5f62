// What regions are called and coloured, and the list of them with all that they hold.

const NUMBERS = [
  // key, label, default, step, lowest, highest, what it does
  ["weight", "Weight", 2.5, 0.1, -100, 100, "How strongly the words are pulled here"],
  ["feather", "Soft edge", 0, 0.01, 0, 1, "Width of the soft edge, as a fraction of the shorter side"],
  ["begin", "Begin", 0, 0.05, 0, 1, "From which fraction of the steps on it guides"],
  ["end", "End", 1, 0.05, 0, 1, "Up to which fraction of the steps it guides"],
  ["strength", "Strength", 1, 0.1, 0, 100, "A factor of the weight; 0 switches it off"],
];
const WORDS = "\u0001words";
const OWN = "\u0001own";
const BACKGROUND = "background";

const make = (tag, cls = "", text = "") => {
  const made = document.createElement(tag);
  if (cls) made.className = cls;
  if (text) made.textContent = text; // never markup: names are strangers' text
  return made;
};

function button(text, title, action) {
  const made = make("button", "", text);
  made.type = "button";
  made.title = title;
  made.setAttribute("aria-label", title);
  made.onclick = action;
  return made;
}

function labelled(text, field, cls = "") {
  const label = make("label", cls, text);
  label.append(field);
  return label;
}

/** What a region is called, as on sheets. */
function nameOf(region) {
  const name = region.subject ?? region.phrase;
  if (name) return region.occurrence ? `${name} ${region.occurrence}` : name;
  if (region.prompt) return region.prompt;
  if (region.lora && Object.keys(region.lora).length) return Object.keys(region.lora).join(" + ");
  if (region.picture) return "reference picture";
  return region.negative_prompt ? `no ${region.negative_prompt}` : "?";
}

function crc32(text) {
  let crc = -1;
  for (const byte of new TextEncoder().encode(text)) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

/** A colour for each name, the one that it has on contact sheets and attention maps (`visualization.py`). */
function coloursOf(names) {
  const hues = new Map();
  for (const name of names) {
    if (hues.has(name)) continue;
    const wanted = crc32(name) % 12;
    const taken = new Set(hues.values());
    let hue = wanted;
    for (let tries = 0; tries < 12 && taken.has(hue); tries++) hue = (hue + 1) % 12;
    hues.set(name, taken.has(hue) ? wanted : hue);
  }
  return new Map([...hues].map(([name, hue]) => [name, hsv(hue / 12)]));
}

function hsv(hue) {
  const channel = (n) => {
    const k = (n + hue * 6) % 6;
    return Math.round(255 * (0.95 - 0.95 * 0.95 * Math.max(0, Math.min(k, 4 - k, 1))));
  };
  return `rgb(${channel(5)}, ${channel(3)}, ${channel(1)})`;
}

/** One line about what a region holds beside its words. */
function holdings(region) {
  const lines = [];
  if (region.prompt && (region.subject || region.phrase)) lines.push(`“${region.prompt}”`);
  if (region.negative_prompt) lines.push(`not “${region.negative_prompt}”`);
  for (const [name, scale] of Object.entries(region.lora ?? {})) lines.push(`LoRA ${name}${scale === 1 ? "" : ` ${scale}`}`);
  if (region.picture) lines.push("reference picture");
  for (const [key, label, usual] of NUMBERS)
    if (region[key] != null && region[key] !== usual) lines.push(`${label.toLowerCase()} ${region[key]}`);
  return lines.join(", ");
}

/** The entry of a region in the list.
 *
 * `host` is what happens: change(region, isTyped), choose(region), act(name, region), file(kind, region), state.
 */
function listEntry(region, number, host) {
  const { subjects, loras, adapters, count } = host.state();
  const item = make("li", "region");
  item.dataset.id = region.id;
  item.classList.toggle("off", region.off);
  const head = make("div", "head");
  const grab = make("span", "grab", "⋮⋮");
  grab.draggable = true;
  grab.title = "Drag to change the order";
  grab.ondragstart = (event) => {
    event.dataTransfer.setData("text/x-region", region.id);
    event.dataTransfer.effectAllowed = "move";
  };

  // What it is
  const what = make("div", "what");
  const select = make("select");
  select.setAttribute("aria-label", `Region ${number}: what stands here`);
  for (const subject of subjects) select.append(new Option(`<${subject.name}> ${subject.class_phrase}`, subject.name));
  if (region.subject && !subjects.some((subject) => subject.name === region.subject))
    select.append(new Option(`<${region.subject}> (not here)`, region.subject));
  select.append(new Option("words of the prompt", WORDS), new Option("only what it holds", OWN));
  select.append(new Option("all that no other region covers", BACKGROUND));
  const isBackground = region.phrase === BACKGROUND;
  select.value = region.subject ?? (isBackground ? BACKGROUND : region.phrase != null ? WORDS : OWN);
  const phrase = make("input");
  phrase.type = "text";
  phrase.maxLength = 200;
  phrase.placeholder = "words, as in the prompt";
  phrase.value = isBackground ? "" : (region.phrase ?? "");
  phrase.hidden = select.value !== WORDS;
  phrase.setAttribute("aria-label", `Region ${number}: words of the prompt`);
  phrase.oninput = () => {
    region.phrase = phrase.value;
    host.change(region, true);
  };
  select.onchange = () => {
    const value = select.value;
    region.subject = [WORDS, OWN, BACKGROUND].includes(value) ? null : value;
    region.phrase = value === WORDS ? phrase.value : value === BACKGROUND ? BACKGROUND : null;
    region.occurrence = null;
    if (value === BACKGROUND) region.shape = null;
    else region.shape ??= { box: [0.3, 0.3, 0.7, 0.7] };
    if (value === OWN) host.state().open.add(region.id);
    host.change(region, false);
  };
  what.append(select, phrase);

  // What can be done with it
  const buttons = make("span", "set");
  const off = button(region.off ? "Off" : "On", region.off ? "Switch this region on" : "Switch this region off", () => {
    region.off = !region.off;
    host.change(region, false);
  });
  off.setAttribute("aria-pressed", String(!region.off));
  off.classList.add("switch");
  const front = button("▲", "Bring to the front by one", () => host.act("front", region));
  const back = button("▼", "Send to the back by one", () => host.act("back", region));
  front.disabled = number === count;
  back.disabled = number === 1;
  const isOpen = host.state().open.has(region.id);
  const more = button(isOpen ? "Less" : "More", "Show what this region holds", () => {
    const { open } = host.state();
    if (!open.delete(region.id)) open.add(region.id);
    host.redraw();
  });
  more.setAttribute("aria-expanded", String(isOpen));
  buttons.append(off, front, back, button("Copy", "Duplicate this region", () => host.act("duplicate", region)));
  buttons.append(button("✕", "Delete this region", () => host.act("delete", region)), more);
  head.append(grab, what, buttons);
  item.append(head, make("div", "holds", holdings(region)), make("ul", "problems"));
  if (isOpen) item.append(fieldsOf(region, number, host, { loras, adapters }));

  item.onpointerdown = item.onfocusin = () => host.choose(region);
  item.ondragover = (event) => {
    if (!event.dataTransfer.types.includes("text/x-region")) return;
    event.preventDefault();
    event.stopPropagation();
    item.classList.add("over");
  };
  item.ondragleave = () => item.classList.remove("over");
  item.ondrop = (event) => {
    const id = event.dataTransfer.getData("text/x-region");
    if (!id) return;
    event.preventDefault();
    event.stopPropagation();
    host.act("before", region, id);
  };
  return item;
}

function fieldsOf(region, number, host, { loras, adapters }) {
  const fields = make("div", "fields");
  const named = (field, name) => {
    field.setAttribute("aria-label", `Region ${number}: ${name}`);
    return field;
  };
  for (const [key, label, usual, step, low, high, title] of NUMBERS) {
    const input = make("input");
    Object.assign(input, { type: "number", step, min: low, max: high, placeholder: usual, value: region[key] ?? "", title });
    input.oninput = () => {
      const value = input.value === "" ? null : Number(input.value);
      region[key] = value === null || Number.isFinite(value) ? value : null;
      host.change(region, true);
    };
    fields.append(labelled(label, named(input, label)));
  }
  const which = make("input");
  Object.assign(which, { type: "number", step: 1, min: 1, max: 99, placeholder: "–", value: region.occurrence ?? "" });
  which.title = "Which of several equal words of the prompt it is, counted from 1";
  which.oninput = () => {
    const value = Number(which.value);
    region.occurrence = Number.isInteger(value) && value > 0 ? value : null;
    host.change(region, true);
  };
  fields.append(labelled("Which one", named(which, "Which one")));
  for (const [key, label, hint] of [
    ["prompt", "Words of its own", "a red <rex>: seen here alone"],
    ["negative_prompt", "Not here", "what this region must not show"],
  ]) {
    const input = make("input");
    Object.assign(input, { type: "text", maxLength: 1000, placeholder: hint, value: region[key] ?? "" });
    input.oninput = () => {
      region[key] = input.value.trim() ? input.value : null;
      host.change(region, true);
    };
    fields.append(labelled(label, named(input, label), "wide"));
  }
  if (loras.length || region.lora) fields.append(labelled("LoRA", loraField(region, number, host, loras), "wide"));
  if (adapters || region.picture) {
    const pair = make("span", "pair");
    if (region.picture && picture(region.picture, host.redraw)) {
      const shown = make("img");
      shown.src = region.picture;
      shown.alt = "reference picture";
      pair.append(shown);
    }
    pair.append(button("Choose …", `Region ${number}: choose a reference picture`, () => host.file("picture", region)));
    if (region.picture)
      pair.append(
        button("Remove", `Region ${number}: remove the reference picture`, () => {
          region.picture = null;
          host.change(region, false);
        }),
      );
    fields.append(labelled("Reference picture", pair, "wide"));
  }
  return fields;
}

/** A row for each LoRA that the region holds, and an empty one for another. */
function loraField(region, number, host, loras) {
  const rows = make("span", "rows");
  const held = Object.entries(region.lora ?? {});
  held.concat([["", 1]]).forEach(([name, scale], place) => {
    const pair = make("span", "pair");
    const select = make("select");
    select.setAttribute("aria-label", `Region ${number}: LoRA ${place + 1}`);
    select.append(new Option(held.length ? "no other" : "none", ""));
    for (const each of new Set([...loras, ...held.map(([one]) => one)])) select.append(new Option(each, each));
    select.value = name;
    const factor = make("input");
    Object.assign(factor, { type: "number", step: 0.1, min: -10, max: 10, value: scale, title: "Scale of the LoRA" });
    factor.setAttribute("aria-label", `Region ${number}: scale of LoRA ${place + 1}`);
    factor.hidden = !name;
    const take = (isTyped) => {
      held[place] = [select.value, factor.value === "" ? 1 : Number(factor.value)];
      const left = held.filter(([one]) => one);
      region.lora = left.length ? Object.fromEntries(left) : null;
      host.change(region, isTyped);
    };
    select.onchange = () => take(false);
    factor.oninput = () => take(true);
    pair.append(select, factor);
    rows.append(pair);
  });
  return rows;
}
