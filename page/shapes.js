// Shapes of regions: where they are, what a drag makes of them, how they are painted. Fractions of width and height.
// Part of the canvas's one function; `element`, `props` and `watch` come from Gradio.

const SMALLEST = 0.02; // side of a box
const RASTER = 512; // longer side in pixels of a mask that was painted over

const clamp = (value, low = 0, high = 1) => Math.min(high, Math.max(low, value));
const round = (value) => Math.round(value * 1e4) / 1e4;
const copy = (value) => JSON.parse(JSON.stringify(value));

/** The edges of a box or an ellipse; null of a painted shape. */
const edges = (shape) => shape?.box ?? shape?.ellipse ?? null;

const withEdges = (shape, values) => (shape.box ? { box: values.map(round) } : { ellipse: values.map(round) });

/** A box of at least the smallest size between two points, inside the picture. */
function between([x, y], [u, v]) {
  return [Math.min(x, u), Math.min(y, v), Math.max(x, u), Math.max(y, v)].map((value) => clamp(value));
}

function moved([a, b, c, d], dx, dy) {
  dx = clamp(dx, -a, 1 - c);
  dy = clamp(dy, -b, 1 - d);
  return [a + dx, b + dy, c + dx, d + dy];
}

/** The box with those edges of it moved that `grip` names (a text of n, e, s and w). */
function resized(box, grip, dx, dy) {
  const [a, b, c, d] = box;
  return [
    grip.includes("w") ? clamp(a + dx, 0, c - SMALLEST) : a,
    grip.includes("n") ? clamp(b + dy, 0, d - SMALLEST) : b,
    grip.includes("e") ? clamp(c + dx, a + SMALLEST, 1) : c,
    grip.includes("s") ? clamp(d + dy, b + SMALLEST, 1) : d,
  ];
}

/** Where a value catches on the nearest of some lines, or null. */
function caught(value, lines, reach) {
  const near = lines.filter((line) => Math.abs(line - value) <= reach);
  return near.length ? near.reduce((a, b) => (Math.abs(a - value) <= Math.abs(b - value) ? a : b)) : null;
}

// --- painted shapes --------------------------------------------------------------------------------------------------

const pictures = new Map(); // data URL -> loaded Image

/** The picture of a data URL, once it is there; `redraw` is called when it comes later. */
function picture(url, redraw) {
  if (!/^data:image\/(png|jpeg|webp);base64,[\w+/=]+$/.test(url ?? "")) return null;
  let image = pictures.get(url);
  if (!image) {
    if (pictures.size > 60) pictures.clear();
    image = new Image();
    image.onload = () => redraw?.();
    image.src = url;
    pictures.set(url, image);
  }
  return image.complete && image.naturalWidth ? image : null;
}

/** The size in pixels at which shapes of a picture of this size are painted. */
function rasterSize([width, height]) {
  const scale = RASTER / Math.max(width, height);
  return [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
}

function blank([width, height]) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

/** Paint strokes in opaque white, or rub them out. */
function paintStrokes(context, strokes, [width, height]) {
  context.lineCap = context.lineJoin = "round";
  context.strokeStyle = "#fff";
  for (const stroke of strokes) {
    context.globalCompositeOperation = stroke.erase ? "destination-out" : "source-over";
    context.lineWidth = stroke.width * Math.min(width, height);
    context.beginPath();
    stroke.points.forEach(([x, y], index) => context[index ? "lineTo" : "moveTo"](x * width, y * height));
    const [x, y] = stroke.points[0];
    if (stroke.points.length === 1) context.lineTo(x * width + 0.01, y * height);
    context.stroke();
  }
  context.globalCompositeOperation = "source-over";
}

/** A shape as a canvas: opaque white inside, transparent outside. */
function rastered(shape, size, redraw) {
  const [width, height] = rasterSize(size);
  const canvas = blank([width, height]);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  if (shape.box) {
    const [a, b, c, d] = shape.box;
    context.fillRect(a * width, b * height, (c - a) * width, (d - b) * height);
  } else if (shape.ellipse) {
    const [a, b, c, d] = shape.ellipse;
    context.beginPath();
    context.ellipse(((a + c) / 2) * width, ((b + d) / 2) * height, ((c - a) / 2) * width, ((d - b) / 2) * height, 0, 0, 7);
    context.fill();
  } else if (shape.strokes) {
    paintStrokes(context, shape.strokes, [width, height]);
  } else if (shape.mask) {
    const image = picture(shape.mask, redraw);
    if (image) {
      context.drawImage(image, 0, 0, width, height);
      const data = context.getImageData(0, 0, width, height);
      for (let i = 0; i < data.data.length; i += 4) {
        data.data[i + 3] = data.data[i]; // masks are grey: white is inside
        data.data[i] = data.data[i + 1] = data.data[i + 2] = 255;
      }
      context.putImageData(data, 0, 0);
    }
  }
  return canvas;
}

/** A canvas of `rastered` as the mask of a shape. */
function asMask(canvas) {
  const black = blank([canvas.width, canvas.height]);
  const context = black.getContext("2d");
  context.fillStyle = "#000";
  context.fillRect(0, 0, black.width, black.height);
  context.drawImage(canvas, 0, 0);
  return { mask: black.toDataURL("image/png") };
}

/** The edges of what is opaque on a canvas, in fractions; null where nothing is. */
function extent(canvas) {
  const { width, height } = canvas;
  const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
  let [a, b, c, d] = [width, height, -1, -1];
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      if (data[4 * (y * width + x) + 3] > 127) [a, b, c, d] = [Math.min(a, x), Math.min(b, y), Math.max(c, x), Math.max(d, y)];
  return c < 0 ? null : [a / width, b / height, (c + 1) / width, (d + 1) / height];
}

/** A painted shape somewhere else. */
function shifted(shape, dx, dy, size) {
  if (shape.strokes) {
    const move = ([x, y]) => [round(clamp(x + dx, -0.9, 1.9)), round(clamp(y + dy, -0.9, 1.9))];
    return { strokes: shape.strokes.map((stroke) => ({ ...stroke, points: stroke.points.map(move) })) };
  }
  const from = rastered(shape, size);
  const to = blank([from.width, from.height]);
  to.getContext("2d").drawImage(from, dx * from.width, dy * from.height);
  return asMask(to);
}

// --- files -----------------------------------------------------------------------------------------------------------

/** A file of the user's as a canvas of at most `most` pixels a side. Rejects with a sentence. */
async function decoded(file, most) {
  if (file.size > 20e6) throw new Error("That file is larger than 20 MB.");
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error("That file is no picture that this browser can read; expected PNG, JPEG or WebP.");
  }
  const scale = Math.min(1, most / Math.max(bitmap.width, bitmap.height));
  const canvas = blank([Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale))]);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = scale < 1;
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas;
}

/** The mask that a picture is: its alpha channel where it has one, else its brightness. */
function maskOf(canvas) {
  const context = canvas.getContext("2d");
  const image = context.getImageData(0, 0, canvas.width, canvas.height);
  const { data } = image;
  let isOpaque = true;
  for (let i = 3; i < data.length && isOpaque; i += 4) isOpaque = data[i] === 255;
  for (let i = 0; i < data.length; i += 4) {
    const inside = isOpaque ? Math.round(0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2]) : data[i + 3];
    data[i] = data[i + 1] = data[i + 2] = inside;
    data[i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return { mask: canvas.toDataURL("image/png") };
}

/** One mask for each colour of a map; the commonest grey, or else the commonest colour, is the background. */
function masksOf(canvas, most) {
  const context = canvas.getContext("2d");
  const image = context.getImageData(0, 0, canvas.width, canvas.height);
  const { data } = image;
  const counts = new Map();
  const key = (i) => (data[i + 3] < 128 ? -1 : (data[i] << 16) | (data[i + 1] << 8) | data[i + 2]);
  for (let i = 0; i < data.length; i += 4) counts.set(key(i), (counts.get(key(i)) ?? 0) + 1);
  const enough = (data.length / 4) * 0.005; // blended edges are no regions
  const colours = [...counts].filter(([colour, count]) => colour >= 0 && count >= enough).sort((a, b) => b[1] - a[1]);
  const isGrey = ([colour]) => colour >> 16 === ((colour >> 8) & 255) && (colour & 255) === ((colour >> 8) & 255);
  const background = (counts.get(-1) ?? 0) >= enough ? null : (colours.find(isGrey) ?? colours[0]);
  return colours
    .filter((colour) => colour !== background)
    .slice(0, most)
    .map(([colour]) => {
      const mask = blank([canvas.width, canvas.height]);
      const out = context.createImageData(canvas.width, canvas.height);
      for (let i = 0; i < data.length; i += 4) {
        out.data[i] = out.data[i + 1] = out.data[i + 2] = key(i) === colour ? 255 : 0;
        out.data[i + 3] = 255;
      }
      mask.getContext("2d").putImageData(out, 0, 0);
      return { mask: mask.toDataURL("image/png") };
    });
}
