// The prompt, with its subjects and the regions' words as chips.

/** What the prompt names: [start, end, {name, colour, id}], in order, none within another. */
function namedIn(text) {
  const looks = colours();
  const wanted = [];
  for (const subject of offers.subjects) {
    const region = page.regions.find((one) => one.subject === subject.name);
    wanted.push([`<${subject.name}>`, { colour: looks.subject(subject.name), id: region?.id }]);
  }
  for (const region of page.regions)
    if (region.phrase?.trim() && region.phrase !== BACKGROUND)
      wanted.push([region.phrase.trim(), { colour: looks.region(region).colour, id: region.id }]);
  const found = [];
  const low = text.toLowerCase();
  for (const [words, what] of wanted.sort((a, b) => b[0].length - a[0].length))
    for (let start = 0; (start = low.indexOf(words.toLowerCase(), start)) >= 0; start += words.length) {
      const end = start + words.length;
      const isWhole = !/[\p{L}\p{N}]{2}/u.test(text.slice(start - 1, start + 1)) && !/[\p{L}\p{N}]{2}/u.test(text.slice(end - 1, end + 1));
      if (isWhole && !found.some(([from, to]) => start < to && from < end)) found.push([start, end, what]);
    }
  return found.sort((a, b) => a[0] - b[0]);
}

/** The text fields: as high as their text, and what the prompt names in its colour. */
function redrawWords() {
  for (const [area, key] of FIELDS) {
    if (area !== document.activeElement && area.value !== page[key]) area.value = page[key];
    area.style.height = "auto";
    if (area.scrollHeight) area.style.height = `${area.scrollHeight + 2}px`;
  }
  const parts = [];
  let end = 0;
  const text = $(".prompt").value;
  const found = namedIn(text);
  for (const [from, to, { colour, id }] of found) {
    const mark = tint(make("mark", id && id === chosen ? "chosen" : "", text.slice(from, to)), colour);
    parts.push(text.slice(end, from), mark);
    end = to;
  }
  $(".marks").replaceChildren(...parts, `${text.slice(end)}\n`);
  const low = text.toLowerCase();
  for (const each of root.querySelectorAll(".names button"))
    each.classList.toggle("named", low.includes(each.textContent.toLowerCase()));
}

/** Put words into the prompt: at the caret, or behind the last subject that is there. */
function insert(words) {
  const area = $(".prompt");
  const isEditing = area.dataset.caret !== undefined && area.value === page.prompt;
  const text = page.prompt;
  const last = text.lastIndexOf(">");
  if (isEditing) {
    const [before, after] = [text.slice(0, area.dataset.caret), text.slice(area.dataset.caret)];
    page.prompt = `${before}${/\S$/.test(before) ? " " : ""}${words}${/^[\s,.]|^$/.test(after) ? "" : " "}${after}`;
  } else if (last >= 0) page.prompt = `${text.slice(0, last + 1)} and ${words}${text.slice(last + 1)}`;
  else page.prompt = `${text.trim() || "a photo of"} ${words}`;
  delete area.dataset.caret;
  area.value = page.prompt;
  changed();
}

const FIELDS = [[$(".prompt"), "prompt"], [$(".negative"), "negative_prompt"]]; // prettier-ignore
for (const [area, key] of FIELDS) {
  area.oninput = () => {
    page[key] = area.value;
    changed(true);
  };
  area.onblur = () => (area.dataset.caret = area.selectionStart);
}
$(".prompt").onclick = ({ target }) => {
  const caret = target.selectionStart;
  const [, , what] = namedIn(target.value).find(([from, to]) => from < caret && caret < to) ?? [];
  if (what?.id) host.choose(regionOf(what.id));
};
