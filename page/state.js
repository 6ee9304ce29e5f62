// The canvas's state: the document, what is chosen, what can be undone; what passes to and from the server.

const root = element.querySelector(".ms");
const $ = (selector) => root.querySelector(selector);
const stage = $(".stage");
const MOST_REGIONS = 24;
const USERS = ["size", "prompt", "negative_prompt", "regions", "underlay"];

let page = { size: [512, 512], prompt: "", negative_prompt: "", regions: [], underlay: null, revision: 0 };
let offers = { sizes: [], subjects: [], loras: [], adapters: [] };
let problems = [];
let picked = null; // what the next region is: {subject} or {phrase}
let chosen = null; // id of the chosen region
let tool = "box";
let isArmed = false; // the next drag draws, whatever lies under it
let drag = null;
let [past, future] = [[], []];
let settled = null; // the regions after the last change
let typedIn = null; // the field of a region in which the last change was typed
let timer = null;
const open = new Set(); // ids of regions whose fields are shown

const regionOf = (id) => page.regions.find((region) => region.id === id) ?? null;
const isPainted = (region) => Boolean(region.shape && !edges(region.shape));

// --- to and from the server ------------------------------------------------------------------------------------------

function send(isTyped) {
  clearTimeout(timer);
  page.revision += 1;
  settled = snapshot();
  if (!isTyped) typedIn = null;
  if (isTyped) timer = setTimeout(sendNow, 200);
  else sendNow();
}

function sendNow() {
  clearTimeout(timer);
  if (drag) return void (timer = setTimeout(sendNow, 100)); // what is being drawn is not there yet
  props.value = copy(page); // Gradio sends it with its `change` event
}

/** The user changed something: `isTyped` in a field that must keep its focus. */
function changed(isTyped = false) {
  if (isTyped) redrawStage(), redrawNotes();
  else redraw();
  send(isTyped);
}

const snapshot = () => copy({ regions: page.regions, size: page.size });

function remember(state = snapshot()) {
  past.push(state);
  if (past.length > 100) past.shift();
  future = [];
}

function step(from, to) {
  if (!from.length) return;
  to.push(snapshot());
  Object.assign(page, from.pop());
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
  return { ...empty, negative_prompt: null, lora: null, ip_adapter_image: null, ...region, id: region.id ?? freshId() };
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
