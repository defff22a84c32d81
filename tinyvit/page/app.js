// The page stores the strokes, sends them to the server during the drawing, and shows the answers.
"use strict";

const $ = (id) => document.getElementById(id);
const PEN = 0.05;              // width of the visible pen, as a share of the side; the server draws with MNIST's pen
const LEAST_MOVE = 0.004;      // least distance between two points, as a share of the side
const LEAST_PAUSE = 16;        // milliseconds between two requests, which is one frame of a screen
const FRAME_OF_IMAGE = { left: 0, top: 0, side: 1 };

// ---- the drawing: a history of states { strokes, sample }, so that undo also works after clear and after samples

let history = [{ strokes: [], sample: null }];
let limits = { strokes: 100, points_per_stroke: 2000, body_bytes: 65536 };  // until the server sends its limits
let names = [..."0123456789"];  // of the classes
let answer = null;             // the last answer for the present drawing
let generation = 0;            // number of drawings; the page ignores answers for earlier ones

const now = () => history[history.length - 1];
const article = (digit, a = "a") => (digit === 8 ? `${a}n` : a);
const isEmpty = () => !now().strokes.length && now().sample === null;

function change(state) {
  history.push(state);
  if (history.length > 200) history.shift();
}

function startDrawing(when) {
  generation += 1;
  if (isEmpty()) forget();
  else send(when);
  paint();
}

function forget() {
  answer = null;
  next = null;
  show();
}

// ---- requests: one at a time; the next one contains everything that was drawn meanwhile

let next = null;
let sending = false;

function send(when) {
  const { strokes, sample } = now();
  const request = sample === null
    ? ["api/predict/strokes", { strokes: thinned(strokes).map((points) => points.map((p) => p.map(rounded))) }]
    : ["api/predict/pixels", { pixels: sample.pixels }];
  next = { request, generation, when };
  if (!sending) sendAll();
}

const rounded = (value) => Math.round(value * 1e4) / 1e4;

function thinned(strokes) {  // leaves out points, so that the body of a request keeps to the limits of the server
  const most = limits.body_bytes / 20;  // a point takes at most 16 bytes
  const count = strokes.reduce((total, points) => total + points.length, 0);
  const longest = Math.max(...strokes.map((points) => points.length));
  const step = Math.max(1, Math.ceil(count / most), Math.ceil(longest / (limits.points_per_stroke - 1)));
  return strokes.map((points) => points.filter((_, i) => i % step === 0 || i === points.length - 1));
}

async function sendAll() {
  sending = true;
  while (next) {
    const sent = next;
    next = null;
    const [address, body] = sent.request;
    const began = performance.now();
    let pause = LEAST_PAUSE;
    try {
      const response = await fetch(address, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify(body),
        signal: AbortSignal.timeout(10000),
      });
      const found = await response.json();
      if (sent.generation !== generation) continue;  // the drawing was cleared, undone or replaced meanwhile
      if (response.ok) {
        answer = found;
        show();
        $("latency").textContent = `Answered ${Math.max(1, Math.round(performance.now() - sent.when))} ms after the pen moved.`;
      } else if (response.status === 503) {
        pause = performance.now() - began + 1000 * Number(response.headers.get("retry-after") || 1);
        complain("The server is busy. Trying again.");
        next = next || sent;
      } else {
        complain(`The server says: ${found.detail}`);
      }
    } catch {
      pause = performance.now() - began + 1500;
      if (sent.generation === generation) {
        complain("The server does not answer. Trying again. Is it still running?");
        next = next || sent;
      }
    }
    const rest = pause - (performance.now() - began);
    if (rest > 0) await new Promise((resolve) => setTimeout(resolve, rest));
  }
  sending = false;
}

function complain(text) {
  $("verdict").textContent = text;
  announce(text);
}

// ---- the pen

const ink = $("ink");
let stroke = null;             // the unfinished stroke, the last one of now().strokes
let pointer = null;
let cursor = { x: 0.3, y: 0.2, down: false };

const clamped = (value) => Math.min(1, Math.max(0, value));

function place(event) {
  const box = ink.getBoundingClientRect();
  return [clamped((event.clientX - box.left) / box.width), clamped((event.clientY - box.top) / box.height)];
}

function begin(point, when) {
  const { strokes, sample } = now();
  if (sample === null && strokes.length >= limits.strokes) {
    complain(`A drawing can have at most ${limits.strokes} strokes. Clear it, or undo some strokes.`);
    return;
  }
  stroke = [point];
  const continued = sample === null && strokes.length > 0;
  change({ strokes: sample === null ? [...strokes, stroke] : [stroke], sample: null });
  if (continued) extendDone(when);
  else startDrawing(when);
}

function extend(points, when) {
  const before = stroke.length;
  for (const point of points) {
    const last = stroke[stroke.length - 1];
    if (Math.hypot(point[0] - last[0], point[1] - last[1]) >= LEAST_MOVE) stroke.push(point);
  }
  if (stroke.length > before) extendDone(when);
}

function extendDone(when) {
  send(when);
  paint();
}

ink.addEventListener("pointerdown", (event) => {
  if (pointer !== null || event.button !== 0) return;
  ink.setPointerCapture(event.pointerId);
  pointer = event.pointerId;
  cursor.down = false;
  begin(place(event), event.timeStamp);
});
ink.addEventListener("pointermove", (event) => {
  if (event.pointerId !== pointer || !stroke) return;
  const parts = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
  extend((parts.length ? parts : [event]).map(place), event.timeStamp);
});
for (const kind of ["pointerup", "pointercancel", "lostpointercapture"]) {
  ink.addEventListener(kind, (event) => {
    if (event.pointerId !== pointer) return;
    pointer = null;
    stroke = null;
  });
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const held = new Set();

ink.addEventListener("keydown", (event) => {
  if (ARROWS[event.key] && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    held.add(event.key);
    const step = event.shiftKey ? 0.08 : 0.025;
    for (const key of held) {  // two keys together move the pen diagonally
      cursor.x = clamped(cursor.x + ARROWS[key][0] * step);
      cursor.y = clamped(cursor.y + ARROWS[key][1] * step);
    }
    if (cursor.down && stroke) extend([[cursor.x, cursor.y]], event.timeStamp);
    paint();
  } else if (event.key === " " || event.key === "Enter") {
    event.preventDefault();
    if (event.repeat || pointer !== null) return;
    cursor.down = !cursor.down;
    if (cursor.down) begin([cursor.x, cursor.y], event.timeStamp);
    else stroke = null;
    cursor.down = stroke !== null;  // `begin` starts no stroke after the last one that the limits allow
    announce(cursor.down ? "Pen down" : "Pen up");
    if (answer && !cursor.down) announceSoon(spoken());  // it may have come before the pen was lifted
    paint();
  } else if (event.key === "Escape") {
    liftPen();
    paint();
  }
});
ink.addEventListener("keyup", (event) => held.delete(event.key));
ink.addEventListener("blur", () => { held.clear(); liftPen(); paint(); });
ink.addEventListener("focus", () => paint());

function liftPen() {
  if (pointer === null) stroke = null;
  cursor.down = false;
}

// ---- undo, clear, samples

function undo(when) {
  if (history.length < 2) return;
  liftPen();
  stroke = null;
  history.pop();
  startDrawing(when);
}

function clear(when) {
  if (isEmpty()) return;
  liftPen();
  stroke = null;
  change({ strokes: [], sample: null });
  startDrawing(when);
  announce("Cleared");
}

$("undo").addEventListener("click", (event) => undo(event.timeStamp));
$("clear").addEventListener("click", (event) => clear(event.timeStamp));
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key.toLowerCase() === "z") {
    event.preventDefault();
    undo(event.timeStamp);
  }
});

const KINDS = {
  "plain": "Easy digits",
  "barely read": "Read with little certainty",
  "misread": "Misread by the model in the package",
};

function showSamples(samples) {
  for (const [kind, title] of Object.entries(KINDS)) {
    const chosen = samples.filter((sample) => sample.kind === kind);
    if (!chosen.length) continue;
    const group = document.createElement("div");
    group.className = "group";
    const heading = document.createElement("h3");
    heading.textContent = title;
    const row = document.createElement("div");
    for (const sample of chosen) row.append(sampleButton(sample));
    group.append(heading, row);
    $("sample-groups").append(group);
  }
}

function sampleButton(sample) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "sample";
  button.dataset.index = sample.index;
  button.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-label", `${article(sample.label, "A")} ${sample.label}, ${sample.kind}: test image ${sample.index}`);
  button.title = `test image ${sample.index}, labelled ${sample.label}`;
  const canvas = document.createElement("canvas");
  button.append(canvas);
  button.sample = sample;
  button.addEventListener("click", (event) => {
    liftPen();
    stroke = null;
    change({ strokes: [], sample });
    startDrawing(event.timeStamp);
  });
  return button;
}

// ---- colours and canvases

let colours = {};

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["ink", "grid", "heat", "accent", "paper"]) colours[name] = style.getPropertyValue(`--${name}`).trim();
}

function prepared(canvas, pixels) {
  const side = pixels || Math.max(1, Math.round(canvas.clientWidth * (window.devicePixelRatio || 1)));
  if (canvas.width !== side || canvas.height !== side) canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, side, side);
  return [context, side];
}

function rgb(colour) {  // "#rrggbb" or "#rgb" to three integers
  const digits = colour.length === 4 ? [...colour.slice(1)].map((digit) => digit + digit).join("") : colour.slice(1);
  return [0, 2, 4].map((i) => parseInt(digits.slice(i, i + 2), 16));
}

function pixelCanvas(pixels, canvas) {  // draws pixels in the page's ink colour; the grey level is the opacity
  canvas.width = pixels[0].length;
  canvas.height = pixels.length;
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  const colour = rgb(colours.ink);
  pixels.flat().forEach((level, i) => image.data.set([...colour, level], 4 * i));
  context.putImageData(image, 0, 0);
  return canvas;
}

function paintHeat(context, shares, frame, side, grid) {
  const count = Math.round(Math.sqrt(shares.length));
  const step = (frame.side * side) / count;
  const most = Math.max(...shares, 1e-9);
  shares.forEach((share, i) => {
    context.fillStyle = `rgb(${colours.heat} / ${(0.85 * share) / most})`;
    // The corners are whole pixels, because neighbouring patches would overlap otherwise.
    const [x0, y0] = [(i % count), Math.floor(i / count)];
    const left = Math.round(frame.left * side + x0 * step), right = Math.round(frame.left * side + (x0 + 1) * step);
    const top = Math.round(frame.top * side + y0 * step), bottom = Math.round(frame.top * side + (y0 + 1) * step);
    context.fillRect(left, top, right - left, bottom - top);
  });
  if (grid) paintGrid(context, count, frame, side);
}

function paintGrid(context, count, frame, side) {
  const step = (frame.side * side) / count;
  context.strokeStyle = colours.grid;
  context.lineWidth = Math.max(1, side / 400);
  context.beginPath();
  for (let i = 0; i <= count; i += 1) {
    const x = frame.left * side + i * step, y = frame.top * side + i * step;
    context.moveTo(x, frame.top * side);
    context.lineTo(x, (frame.top + frame.side) * side);
    context.moveTo(frame.left * side, y);
    context.lineTo((frame.left + frame.side) * side, y);
  }
  context.stroke();
}

// ---- the drawing

function paint() {
  const [context, side] = prepared(ink);
  const { strokes, sample } = now();
  if (sample !== null) {
    context.imageSmoothingEnabled = false;
    context.drawImage(pixelCanvas(sample.pixels, document.createElement("canvas")), 0, 0, side, side);
  }
  context.strokeStyle = context.fillStyle = colours.ink;
  context.lineWidth = PEN * side;
  context.lineCap = context.lineJoin = "round";
  for (const points of strokes) {
    context.beginPath();
    points.forEach(([x, y], i) => (i ? context.lineTo(x * side, y * side) : context.moveTo(x * side, y * side)));
    if (points.length === 1) context.lineTo(points[0][0] * side, points[0][1] * side + 0.01);
    context.stroke();
  }
  if (document.activeElement === ink && ink.matches(":focus-visible") && pointer === null) paintCursor(context, side);
  $("empty").hidden = !isEmpty() || document.activeElement === ink && ink.matches(":focus-visible");
  $("undo").disabled = history.length < 2;
  $("clear").disabled = isEmpty();
  for (const button of document.querySelectorAll(".sample")) {
    button.setAttribute("aria-pressed", String(button.sample === sample));
  }
  paintOver();
}

function paintCursor(context, side) {
  const x = cursor.x * side, y = cursor.y * side, arm = 0.03 * side;
  context.strokeStyle = colours.accent;
  context.lineWidth = Math.max(2, side / 200);
  context.beginPath();
  context.arc(x, y, (PEN / 2) * side, 0, 2 * Math.PI);
  if (cursor.down) {
    context.fillStyle = colours.accent;
    context.fill();
  }
  for (const [dx, dy] of Object.values(ARROWS)) {
    context.moveTo(x + dx * arm, y + dy * arm);
    context.lineTo(x + dx * 1.8 * arm, y + dy * 1.8 * arm);
  }
  context.stroke();
}

function paintOver() {
  const [context, side] = prepared($("over"));
  if (!answer || !$("overlay").checked || isEmpty()) return;
  const frame = now().sample === null ? answer.frame : FRAME_OF_IMAGE;
  const look = chosenLook();
  if (look.shares) paintHeat(context, look.shares, frame, side, true);
  else paintGrid(context, patchesPerSide(), frame, side);
}

const patchesPerSide = () => Math.round(Math.sqrt(answer.rollout.length));

// ---- the answer

function chosenLook() {
  const value = document.querySelector("input[name=look]:checked").value;
  if (value === "none" || !answer) return { value, shares: null };
  if (value === "rollout") return { value, shares: answer.rollout, own: 1 - sum(answer.rollout) };
  const [layer, head] = value.split("-").map(Number);
  const [own, ...shares] = answer.attention[layer][head];
  return { value, layer, head, shares, own };
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

function percent(share) {  // only 1 is shown as 100 %, and only 0 as 0 %
  if (share > 0.9995 && share < 1) return "> 99.9\u00a0%";
  if (share > 0 && share < 0.0005) return "< 0.1\u00a0%";
  return `${(100 * share).toFixed(1)}\u00a0%`;
}

function show() {
  showBars();
  showVerdict();
  showSeen();
  showThumbnails();
  paintOver();
}

function showBars() {
  const probabilities = answer ? answer.probabilities : Array(10).fill(0);
  document.querySelectorAll("#bars li").forEach((item, digit) => {
    item.classList.toggle("best", Boolean(answer) && digit === answer.digit);
    item.querySelector(".fill").style.transform = `scaleX(${probabilities[digit]})`;
    item.querySelector(".value").textContent = answer ? percent(probabilities[digit]) : "–";
  });
}

function called(digit) {  // "an 8", or the name of a class that is no digit
  return names[digit] === String(digit) ? `${article(digit)} ${names[digit]}` : names[digit];
}

function showVerdict() {
  const verdict = $("verdict");
  $("digit").textContent = answer ? names[answer.digit] : "?";
  verdict.replaceChildren();
  if (!answer) {
    $("latency").textContent = "\u00a0";
    verdict.textContent = isEmpty() ? "Nothing drawn yet." : "Reading …";
    return;
  }
  const best = answer.probabilities[answer.digit];
  const order = answer.probabilities.map((p, digit) => [p, digit]).sort((a, b) => b[0] - a[0]);
  const strong = document.createElement("strong");
  strong.textContent = `Most probably ${called(answer.digit)}`;
  let text = `, ${percent(best)}.`;
  if (best < 0.8) text += ` Or ${called(order[1][1])}, ${percent(order[1][0])}.`;
  verdict.append(strong, text);
  const { sample } = now();
  if (sample) {
    const right = sample.label === answer.digit;
    const mark = document.createElement("span");
    mark.className = right ? "right" : "wrong";
    mark.textContent = `${right ? "Right" : "Wrong"}: it is labelled ${sample.label}.`;
    verdict.append(document.createElement("br"), " ", mark);
  }
  announceSoon(spoken());
}

function spoken() {
  return $("verdict").textContent;
}

function showSeen() {
  const [context, side] = prepared($("seen"));
  const shares = $("shares");
  const look = chosenLook();
  $("meaning").textContent = meaning(look);
  if (!answer) {
    shares.replaceChildren();
    $("seen").setAttribute("aria-label", "Nothing drawn yet");
    return;
  }
  if (look.shares) paintHeat(context, look.shares, FRAME_OF_IMAGE, side, false);
  context.imageSmoothingEnabled = false;
  context.drawImage(pixelCanvas(answer.pixels, document.createElement("canvas")), 0, 0, side, side);
  paintGrid(context, patchesPerSide(), FRAME_OF_IMAGE, side);
  const texts = (look.shares || []).map((share) => `${Math.round(100 * share)} %`);
  if (shares.children.length !== texts.length) {
    shares.style.gridTemplate = `repeat(${patchesPerSide()}, 1fr) / repeat(${patchesPerSide()}, 1fr)`;
    shares.replaceChildren(...texts.map(() => {
      const cell = document.createElement("span");
      cell.append(document.createElement("b"));
      return cell;
    }));
  }
  texts.forEach((text, i) => { shares.children[i].firstChild.textContent = text; });
  $("seen").setAttribute("aria-label", description(look));
}

function nameOf(look) {
  return look.value === "rollout" ? "Rollout" : `Layer ${look.layer + 1}, head ${look.head + 1}`;
}

function description(look) {
  const picture = "The digit in 28 by 28 pixels";
  if (!look.shares) return `${picture}.`;
  const count = patchesPerSide();
  const most = look.shares.map((share, i) => [share, i]).sort((a, b) => b[0] - a[0]).slice(0, 3);
  const places = most.map(([share, i]) => `row ${Math.floor(i / count) + 1}, column ${(i % count) + 1}: ${percent(share)}`);
  return `${picture}. ${nameOf(look)} looks most at ${places.join("; ")}.`;
}

function meaning(look) {
  if (look.value === "none") return "The input of the model: your drawing, scaled and centred like the digits of MNIST.";
  if (look.value === "rollout") {
    const own = answer ? ` The remaining ${percent(Math.max(0, look.own))} comes from the class token itself.` : "";
    return "The model computes its answer from the class token. This is an estimate of how much each patch contributed " +
      `to that token: the attention, averaged over the heads and multiplied over the layers.${own}`;
  }
  const [layer, head] = look.value.split("-").map(Number);
  const own = answer ? ` It gives ${percent(look.own)} to itself.` : "";
  return `The attention of the class token in head ${head + 1} of layer ${layer + 1}.${own} ` + (layer
    ? "The token of a patch already contains information from other patches here."
    : "The token of a patch contains only that patch here.");
}

function showThumbnails() {
  for (const canvas of document.querySelectorAll(".head canvas")) {
    const [layer, head] = canvas.dataset.look.split("-").map(Number);
    const count = answer ? patchesPerSide() : 4;
    const [context, side] = prepared(canvas, 16 * count);
    if (answer) paintHeat(context, answer.attention[layer][head].slice(1), FRAME_OF_IMAGE, side, false);
  }
}

// ---- for screen readers: the answer when the pen rests, and not sixty times per second

let announcement = null;

function announceSoon(text) {
  clearTimeout(announcement);
  announcement = setTimeout(() => announce(text), 700);
}

function announce(text) {
  clearTimeout(announcement);
  $("live").textContent = text;
}

// ---- building the page

function buildBars() {
  for (let digit = 0; digit < 10; digit += 1) {
    const item = document.createElement("li");
    const name = document.createElement("span");
    name.className = "name";
    name.textContent = digit;
    const track = document.createElement("span");
    track.className = "track";
    track.setAttribute("aria-hidden", "true");
    const fill = document.createElement("span");
    fill.className = "fill";
    track.append(fill);
    const value = document.createElement("span");
    value.className = "value";
    item.append(name, track, value);
    $("bars").append(item);
  }
}

function buildMatrix({ layers, heads }) {
  const matrix = $("matrix");
  matrix.style.gridTemplateColumns = `max-content repeat(${heads}, minmax(0, 1fr))`;
  const cell = (text, className) => {
    const element = document.createElement("span");
    element.className = className;
    element.textContent = text;
    element.setAttribute("aria-hidden", "true");
    return element;
  };
  matrix.append(cell("", "corner"));
  for (let head = 0; head < heads; head += 1) matrix.append(cell(`head ${head + 1}`, "top"));
  for (let layer = 0; layer < layers; layer += 1) {
    matrix.append(cell(`layer ${layer + 1}`, "side"));
    for (let head = 0; head < heads; head += 1) {
      const label = document.createElement("label");
      label.className = "head";
      const input = document.createElement("input");
      input.type = "radio";
      input.name = "look";
      input.value = `${layer}-${head}`;
      input.setAttribute("aria-label", `Layer ${layer + 1}, head ${head + 1}`);
      const canvas = document.createElement("canvas");
      canvas.dataset.look = input.value;
      canvas.setAttribute("aria-hidden", "true");
      label.append(input, canvas);
      matrix.append(label);
    }
  }
}

function describeModel(model) {
  limits = model.limits;
  names = model.class_names;
  document.querySelectorAll("#bars .name").forEach((name, digit) => { name.textContent = names[digit]; });
  const read = model.test_accuracy === null ? "" : ` and reads ${(100 * model.test_accuracy).toFixed(2)} % of MNIST’s test digits correctly`;
  $("about").textContent = `This is ${model.name}. It has ${model.parameters.toLocaleString("en")} parameters` +
    `${read}. Its forward and backward passes are written by hand, on NumPy.`;
  const count = model.patches_per_side;
  $("caption").textContent = `28 × 28 pixels in ${count * count} patches. A stronger colour means more attention.`;
}

$("heads").addEventListener("change", () => {
  showSeen();
  paintOver();
  if (answer) announceSoon(description(chosenLook()));
});
$("overlay").addEventListener("change", paintOver);

function repaintAll() {
  readColours();
  for (const button of document.querySelectorAll(".sample")) pixelCanvas(button.sample.pixels, button.firstChild);
  paint();
  showSeen();
  showThumbnails();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaintAll);
new ResizeObserver(repaintAll).observe($("board"));
new ResizeObserver(repaintAll).observe($("view"));

async function load() {
  const [model, samples] = await Promise.all(["api/model", "api/samples"].map(async (address) => {
    const response = await fetch(address);
    if (!response.ok) throw new Error(`${address}: ${response.status}`);
    return response.json();
  }));
  describeModel(model);
  buildMatrix(model);
  showSamples(samples);
  repaintAll();
}

readColours();
buildBars();
show();
paint();
load().catch(() => complain("The server does not answer. Start it again, and reload this page."));
