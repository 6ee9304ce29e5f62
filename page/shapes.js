// Shapes of regions: where they are, what a drag makes of them, how they are painted. Fractions of width and height.
// Part of the canvas's one function; `element`, `props` and `watch` come from Gradio.

const SMALLEST = 0.02; // side of a box
const RASTER = 512; // longer side in pixels of a mask that was painted over, or of a picture that an encoder looks at

const clamp = (value, low = 0, high = 1) => Math.min(high, Math.max(low, value));
const round = (value) => Math.round(value * 1e4) / 1e4;

/** A copy of plain data. Texts are shared: pictures are long ones, and there are a hundred steps to undo. */
function copy(value) {
  if (Array.isArray(value)) return value.map(copy);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, held]) => [key, copy(held)]));
}

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

const pictures = new Map(); // data URL -> loaded Image, or the canvas of which it was made

/** The picture of a data URL, once it is there; `redraw` is called when it comes later. */
function picture(url, redraw) {
  if (!/^data:image\/(png|jpeg|webp);base64,[\w+/=]+$/.test(url ?? "")) return null;
  let image = pictures.get(url);
  if (!image) {
    image = new Image();
    image.onload = () => redraw?.();
    image.src = url;
    keep(url, image);
  }
  return image instanceof HTMLCanvasElement || (image.complete && image.naturalWidth) ? image : null;
}

function keep(url, image) {
  if (pictures.size >= 80) pictures.delete(pictures.keys().next().value);
  pictures.set(url, image);
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
  const url = black.toDataURL("image/png");
  keep(url, black); // nobody has to wait until it is decoded
  return { mask: url };
}

/** The edges of what is hardly transparent on a canvas, in fractions; null where nothing is. */
function extent(canvas) {
  const { width, height } = canvas;
  const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
  let [a, b, c, d] = [width, height, -1, -1];
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      if (data[4 * (y * width + x) + 3] > 25) {
        if (x < a) a = x;
        if (x > c) c = x;
        if (y < b) b = y;
        d = y;
      }
  return c < 0 ? null : [a / width, b / height, (c + 1) / width, (d + 1) / height];
}

/** A painted shape whose part of the picture `from` comes to lie in `to`. */
function fitted(shape, from, to, size) {
  const scale = [(to[2] - to[0]) / (from[2] - from[0]), (to[3] - to[1]) / (from[3] - from[1])];
  if (shape.strokes) {
    const factor = Math.sqrt(scale[0] * scale[1]);
    const move = (value, axis) => round(clamp(to[axis] + (value - from[axis]) * scale[axis], -0.9, 1.9));
    const strokes = shape.strokes.map((stroke) => ({
      ...stroke,
      width: clamp(round(stroke.width * factor), 0.001, 1),
      points: stroke.points.map((point) => point.map(move)),
    }));
    return { strokes };
  }
  const old = rastered(shape, size);
  const made = blank([old.width, old.height]);
  const [width, height] = [old.width * scale[0], old.height * scale[1]];
  made.getContext("2d").drawImage(old, (to[0] - from[0] * scale[0]) * old.width, (to[1] - from[1] * scale[1]) * old.height, width, height);
  return asMask(made);
}

// --- files -----------------------------------------------------------------------------------------------------------

/** A file of the user's as a canvas of at most `most` pixels a side, `isSmooth` but for maps of colours. Rejects with a
 * sentence. */
async function decoded(file, most, isSmooth = true) {
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
  context.imageSmoothingEnabled = isSmooth && scale < 1;
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

const far = (a, b) => Math.hypot(...a.map((value, index) => value - b[index]));

/** The main colours of an image's data, as [red, green, blue], the commonest first, and how many pixels are clear. */
function mainColours(data) {
  const pixels = data.length / 4;
  let clear = 0;
  for (let i = 3; i < data.length; i += 4) clear += data[i] < 128;
  const counted = (step) => {
    const counts = new Map(); // colour, its parts rounded to the middle of a step -> pixels
    const part = (value) => (step === 1 ? value : Math.floor(value / step) * step + step / 2);
    for (let i = 0; i < data.length; i += 4) {
      if (data[i + 3] < 128) continue;
      const key = (part(data[i]) << 16) | (part(data[i + 1]) << 8) | part(data[i + 2]);
      counts.set(key, (counts.get(key) ?? 0) + 1);
    }
    return [...counts]
      .filter(([, count]) => count >= 0.005 * pixels)
      .sort((a, b) => b[1] - a[1])
      .map(([key, count]) => ({ rgb: [key >> 16, (key >> 8) & 255, key & 255], share: count / pixels }));
  };
  // A small share that lies between two larger ones is their blended edge.
  const isBlend = ({ rgb, share }, larger) =>
    share < 0.03 &&
    larger.some((a, i) => larger.slice(i + 1).some((b) => far(a.rgb, rgb) + far(b.rgb, rgb) < far(a.rgb, b.rgb) + 12));
  const apart = (colours, distance) =>
    colours.reduce((kept, colour) => {
      const isNear = kept.some((other) => far(other.rgb, colour.rgb) < distance);
      return isNear || isBlend(colour, kept) ? kept : [...kept, colour];
    }, []);
  const exact = counted(1);
  const isExact = exact.reduce((sum, { share }) => sum + share, clear / pixels) > 0.9;
  const isNoisy = exact.some((a, i) => exact.slice(i + 1).some((b) => far(a.rgb, b.rgb) < 24));
  const main = isExact && !isNoisy ? apart(exact, 0) : apart(counted(32), 90); // JPEG leaves many where there was one
  return { main: main.map(({ rgb }) => rgb), clear: clear / pixels };
}

/** One mask for each colour of a map, the largest first; the commonest grey, or else the commonest colour, is none.
 *
 * A pixel belongs to the nearest of the map's main colours, so that blended edges leave no gaps.
 */
function masksOf(canvas, most) {
  const { width, height } = canvas;
  const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
  const { main, clear } = mainColours(data);
  const isGrey = (rgb) => Math.max(...rgb) - Math.min(...rgb) < 16;
  const background = clear >= 0.005 ? null : (main.find(isGrey) ?? main[0]);
  const kept = [...main.filter((rgb) => rgb !== background).slice(0, most), ...(background ? [background] : [])];
  const masks = kept.map(() => new ImageData(width, height));
  for (const mask of masks) for (let i = 3; i < data.length; i += 4) mask.data[i] = 255;
  for (let i = 0; i < data.length; i += 4) {
    if (data[i + 3] < 128) continue;
    const rgb = [data[i], data[i + 1], data[i + 2]];
    let nearest = 0;
    for (let k = 1; k < kept.length; k++) if (far(kept[k], rgb) < far(kept[nearest], rgb)) nearest = k;
    if (kept.length) masks[nearest].data.fill(255, i, i + 3);
  }
  return masks
    .filter((_, index) => kept[index] !== background)
    .map((mask) => {
      const made = blank([width, height]);
      made.getContext("2d").putImageData(mask, 0, 0);
      return { mask: made.toDataURL("image/png") };
    });
}
