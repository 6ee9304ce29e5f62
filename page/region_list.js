// What regions are called and coloured, and the list of them with all that they hold.

const NUMBERS = [
  // key, label, default, step, lowest, highest, what it does
  ["weight", "Weight", 2.5, 0.1, 0, 100, "How strongly the words are pulled here"],
  ["feather", "Soft edge", 0, 0.01, 0, 0.5, "Width of the soft edge, as a fraction of the shorter side"],
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

/** What a region stands for: words of the prompt, or what it holds. */
function wordsOf(region) {
  if (region.subject || region.phrase) return region.subject ?? region.phrase;
  if (region.prompt) return region.prompt;
  if (region.lora && Object.keys(region.lora).length) return Object.keys(region.lora).join(" + ");
  if (region.ip_adapter_image) return "reference picture";
  return region.negative_prompt ? `no ${region.negative_prompt}` : "nothing yet";
}

/** id -> what a region is called on sheets (`layout.py`: `region_names`). Parts of one subject share a name. */
function namesOf(regions) {
  const names = new Map();
  const addressOf = (region) => {
    const isNamed = region.subject || (region.phrase && (region.phrase !== BACKGROUND || region.shape));
    return isNamed ? JSON.stringify([wordsOf(region).toLowerCase(), region.occurrence]) : region.id;
  };
  const parts = new Map(); // address -> first region of it
  for (const region of regions)
    if (!region.off && !parts.has(addressOf(region))) parts.set(addressOf(region), region);
  const numbered = ({ occurrence }, words) => (occurrence ? `${words} ${occurrence}` : null);
  const taken = new Set([...parts.values()].map((region) => numbered(region, wordsOf(region))));
  for (const [address, region] of parts) {
    const words = wordsOf(region);
    const isAlone = [...parts.values()].filter((other) => wordsOf(other) === words).length === 1;
    let count = 1;
    if (!isAlone && !region.occurrence) while (taken.has(`${words} ${count}`)) count += 1;
    const name = numbered(region, words) ?? `${words} ${count}`;
    taken.add(name);
    names.set(address, isAlone ? words : name);
  }
  return new Map(
    regions.map((region) => [region.id, names.get(addressOf(region)) ?? numbered(region, wordsOf(region)) ?? wordsOf(region)]),
  );
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

/** Names and colours: `region(region)` -> {name, colour}, `subject(name)` -> the colour of its region, or of the next. */
function looksOf(regions, subjects) {
  const names = namesOf(regions);
  const inOrder = [...regions.filter((region) => !region.off), ...regions.filter((region) => region.off)];
  const hues = coloursOf([...inOrder.map((region) => names.get(region.id)), ...subjects.map((subject) => subject.name)]);
  const region = ({ id }) => ({ name: names.get(id), colour: hues.get(names.get(id)) });
  return {
    region,
    subject(name) {
      const first = regions.find((one) => one.subject === name);
      return first ? region(first).colour : hues.get(name);
    },
  };
}

function hsv(hue) {
  const channel = (n) => {
    const k = (n + hue * 6) % 6;
    return Math.round(255 * (0.95 - 0.95 * 0.95 * Math.max(0, Math.min(k, 4 - k, 1))));
  };
  return `rgb(${channel(5)}, ${channel(3)}, ${channel(1)})`;
}

/** Give an element a colour, and one to write on it that can be read. */
function tint(made, colour) {
  const [red, green, blue] = colour.match(/\d+/g).map(Number);
  made.style.setProperty("--c", colour);
  made.style.setProperty("--on", 0.299 * red + 0.587 * green + 0.114 * blue < 140 ? "#fff" : "#202020");
  return made;
}

/** One line about what a region holds beside its words. */
function holdings(region) {
  const lines = [];
  if (region.prompt && (region.subject || region.phrase)) lines.push(`“${region.prompt}”`);
  if (region.negative_prompt) lines.push(`not “${region.negative_prompt}”`);
  for (const [name, scale] of Object.entries(region.lora ?? {})) lines.push(`LoRA ${name}${scale === 1 ? "" : ` ${scale}`}`);
  if (region.ip_adapter_image) lines.push("reference picture");
  for (const [key, label, usual] of NUMBERS)
    if (region[key] != null && region[key] !== usual) lines.push(`${label.toLowerCase()} ${region[key]}`);
  return lines.join(", ");
}

/** The entry of a region in the list.
 *
 * `host` is what happens: change(region, isTyped), choose(region), act(name, region), reference(region, adapter), state.
 */
function listEntry(region, number, host) {
  const { subjects, loras, adapters, count } = host.state();
  const item = make("li", "region");
  item.dataset.id = region.id;
  item.classList.toggle("off", region.off);
  const head = make("div", "head");
  const grab = button("⋮⋮", `Region ${number}: drag it, or press up or down, to change the order`, () => {});
  grab.classList.add("grab");
  grab.onkeydown = (event) => {
    const name = { ArrowUp: "front", ArrowDown: "back" }[event.key];
    if (!name) return;
    event.preventDefault();
    if (number !== (name === "front" ? count : 1)) host.act(name, region);
  };
  grab.onpointerdown = (event) => startReorder(event, item, region, host);

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
  const front = button("▲", "Bring forward", () => host.act("front", region));
  const back = button("▼", "Send back", () => host.act("back", region));
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

  // What is focused stays so when the list is made anew.
  [grab, select, phrase, off, front, back, more].forEach((each, index) => (each.dataset.field = `head ${index}`));
  item.addEventListener("pointerdown", () => host.choose(region));
  item.addEventListener("focusin", () => host.choose(region));
  return item;
}

/** Drag an entry of the list to another place in it. */
function startReorder(event, item, region, host) {
  if (event.button) return;
  const grab = event.currentTarget;
  const others = [...item.parentElement.querySelectorAll(".region")].filter((other) => other !== item);
  let below = null; // how many of the others stay above it
  grab.setPointerCapture(event.pointerId);
  const mark = () => others.forEach((other, index) => {
    other.classList.toggle("gap-above", index === below);
    other.classList.toggle("gap-below", index === below - 1 && below === others.length);
  }); // prettier-ignore
  grab.onpointermove = ({ clientY }) => {
    if (below === null && Math.abs(clientY - event.clientY) < 5) return;
    item.classList.add("carried");
    below = others.filter((other) => other.getBoundingClientRect().top + other.offsetHeight / 2 < clientY).length;
    mark();
  };
  grab.onpointerup = grab.onpointercancel = ({ type }) => {
    const place = others.length - below; // the list begins with the front, regions with the back
    const isMoved = type === "pointerup" && below !== null;
    below = null;
    mark();
    item.classList.remove("carried");
    grab.onpointermove = grab.onpointerup = grab.onpointercancel = null;
    if (isMoved) host.act("move", region, place);
  };
}

function fieldsOf(region, number, host, { loras, adapters }) {
  const fields = make("div", "fields");
  const named = (field, name, key) => {
    field.setAttribute("aria-label", `Region ${number}: ${name}`);
    field.dataset.field = key;
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
    fields.append(labelled(label, named(input, label, key)));
  }
  const which = make("input");
  Object.assign(which, { type: "number", step: 1, min: 1, max: 99, placeholder: "–", value: region.occurrence ?? "" });
  which.title = "Which of several equal words of the prompt it is, counted from 1";
  which.oninput = () => {
    const value = Number(which.value);
    region.occurrence = Number.isInteger(value) && value > 0 ? value : null;
    host.change(region, true);
  };
  fields.append(labelled("Which one", named(which, "Which one", "occurrence")));
  for (const [key, label, hint] of [
    ["prompt", "Words of its own", "seen here alone, as: a dog with white spots"],
    ["negative_prompt", "Not here", "what this region must not show"],
  ]) {
    const input = make("input");
    Object.assign(input, { type: "text", maxLength: 1000, placeholder: hint, value: region[key] ?? "" });
    input.oninput = () => {
      region[key] = input.value.trim() ? input.value : null;
      host.change(region, true);
    };
    fields.append(labelled(label, named(input, label, key), "wide"));
  }
  if (loras.length || region.lora) fields.append(labelled("LoRA", loraField(region, number, host, loras), "wide"));
  for (const key of new Set([...adapters.keys(), ...Object.keys(region.ip_adapter_image ?? {})].map(String)))
    fields.append(labelled(referenceLabel(adapters, key), referenceField(region, number, host, key), "wide"));
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

/** The number of an IP-Adapter counts from 0; its name tells it from others. */
function referenceLabel(adapters, key) {
  const name = adapters[key] ?? `adapter ${Number(key) + 1}, not here`;
  return adapters.length === 1 && key === "0" ? "Reference picture" : `Reference picture (${name})`;
}

/** The region's picture for an IP-Adapter, and what can be done with it. */
function referenceField(region, number, host, key) {
  const pair = make("span", "pair");
  const url = region.ip_adapter_image?.[key];
  const of = key === "0" ? "" : ` ${Number(key) + 1}`;
  if (url && picture(url, host.redraw)) {
    const shown = make("img");
    shown.src = url;
    shown.alt = "reference picture";
    pair.append(shown);
  }
  pair.append(button("Choose …", `Region ${number}: choose a reference picture${of}`, () => host.reference(region, key)));
  if (url)
    pair.append(
      button("Remove", `Region ${number}: remove the reference picture${of}`, () => {
        const { [key]: _, ...others } = region.ip_adapter_image;
        region.ip_adapter_image = Object.keys(others).length ? others : null;
        host.change(region, false);
      }),
    );
  return pair;
}
