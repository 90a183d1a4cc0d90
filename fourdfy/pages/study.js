"use strict";
// One rater's way through a study: consent, comparisons in random order with random sides, and the answers as JSON.
const data = JSON.parse(document.getElementById("data").textContent);
const element = id => document.getElementById(id);
const videos = { left: element("left"), right: element("right") };
const KEYS = { ArrowLeft: "left", ArrowDown: "tie", ArrowRight: "right" };
const LABELS = { left: "\u2190 Left", tie: "About the same", right: "Right \u2192" };
const invited = new URLSearchParams(location.search).get("rater")?.slice(0, 200);
const place = `study ${data.study} ${invited ?? ""}`;
let state, chosen, current, shown;

function randomBelow(count) {
  return Math.floor(crypto.getRandomValues(new Uint32Array(1))[0] / 2 ** 32 * count);
}

function shuffled(list) {
  const copy = [...list];
  for (let i = copy.length - 1; i > 0; i--) {
    const j = randomBelow(i + 1);
    [copy[i], copy[j]] = [copy[j], copy[i]];
  }
  return copy;
}

function begin() {
  const seat = ([first, second, prompt]) => {
    const [left, right] = shuffled([first, second]);
    return { left, right, prompt };
  };
  const items = shuffled(data.pairs).slice(0, data.comparisons).map(seat);
  for (let i = 0; i < data.checks; i++) {
    const check = { ...seat(data.pairs[randomBelow(data.pairs.length)]), check: shuffled(["left", "right"])[0] };
    items.splice(1 + randomBelow(items.length), 0, check);
  }
  const name = [...crypto.getRandomValues(new Uint8Array(8))].map(byte => byte.toString(16).padStart(2, "0")).join("");
  state = { rater: invited || name, started: new Date().toISOString(), items, at: 0, answers: [], checks: [], finished: null };
}

// A reload goes on where it was, where the browser has a memory for this page.
function remember() {
  try { localStorage.setItem(place, JSON.stringify(state)); } catch { /* it has none */ }
}

function recall() {
  try { state = JSON.parse(localStorage.getItem(place)); } catch { state = null; }
}

function open(part) {
  for (const name of ["consent", "task", "end"]) element(name).hidden = name !== part;
  scrollTo(0, 0);
}

function questions() {
  const { check } = state.items[state.at];
  if (!check) return data.questions;
  return [["", `This is a check that the questions are read. Please answer \u201c${check === "left" ? "Left" : "Right"}\u201d.`]];
}

function show() {
  if (state.at === state.items.length) return finish();
  open("task");
  const item = state.items[state.at];
  chosen = questions().map(() => null);
  current = 0;
  shown = performance.now();
  element("progress").max = state.items.length;
  element("progress").value = state.at;
  element("count").textContent = `${state.at + 1} of ${state.items.length}`;
  element("prompt").textContent = item.prompt;
  for (const [side, video] of Object.entries(videos)) {
    video.src = data.clips[item[side]];
    video.play().catch(() => { /* "error" tells */ });
  }
  element("questions").replaceChildren(...questions().map(row));
  refresh();
}

function row([, text], index) {
  const whole = document.createElement("div"), label = document.createElement("span");
  label.textContent = text;
  label.id = `question${index}`;
  whole.setAttribute("role", "group");
  whole.setAttribute("aria-labelledby", label.id);
  whole.append(label, ...Object.entries(LABELS).map(([side, name]) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.dataset.side = side;
    button.addEventListener("click", () => choose(index, side));
    return button;
  }));
  return whole;
}

// Every moment of a clip was played: of all but what a browser may cut at its ends.
function isWatched(video) {
  let seconds = 0;
  for (let i = 0; i < video.played.length; i++) seconds += video.played.end(i) - video.played.start(i);
  return seconds > 0 && seconds >= 0.9 * video.duration;
}

function choose(index, side) {
  if (!Object.values(videos).every(video => video.dataset.watched)) return;
  chosen[index] = side;
  const open = chosen.indexOf(null);
  current = open < 0 ? index : open;
  refresh();
}

function refresh() {
  const ready = Object.values(videos).every(video => video.dataset.watched);
  [...element("questions").children].forEach((whole, index) => {
    whole.classList.toggle("current", index === current);
    for (const button of whole.querySelectorAll("button")) {
      button.disabled = !ready;
      button.setAttribute("aria-pressed", button.dataset.side === chosen[index]);
    }
  });
  element("wait").textContent = ready ? "" : "Watch both clips to their end; then you can answer.";
  element("next").disabled = chosen.includes(null);
}

function next() {
  if (element("task").hidden || chosen.includes(null)) return;
  const { left, right, check } = state.items[state.at];
  const seconds = Math.round(performance.now() - shown) / 1000;
  if (check) state.checks.push({ expected: check, answer: chosen[0], seconds });
  else data.questions.forEach(([question], i) => state.answers.push({ left, right, question, answer: chosen[i], seconds }));
  state.at++;
  remember();
  show();
}

function result() {
  const { rater, started, finished, answers, checks } = state;
  return JSON.stringify({ study: data.study, rater, started, finished, answers, checks }, null, 1);
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([result()], { type: "application/json" }));
  link.download = `answers-${state.rater.replace(/[^\w-]/g, "_")}.json`;
  link.click();
}

// Sent to where the page came from, if something there takes it (--collect does); else they are a file.
async function finish() {
  open("end");
  state.finished ??= new Date().toISOString();
  remember();
  const told = element("told");
  if (location.protocol.startsWith("http")) {
    told.textContent = "Your answers are being sent.";
    const sent = { method: "POST", headers: { "Content-Type": "application/json" }, body: result() };
    const reply = await fetch("answers", sent).catch(() => null);
    if (reply?.status === 204) { // a web space that takes nothing may say 200
      told.textContent = "Your answers have been sent. You can close this page.";
      return;
    }
  }
  told.textContent = "Your answers were saved as a file. Please send it to whoever invited you.";
  save();
}

for (const video of Object.values(videos)) {
  video.addEventListener("loadstart", () => { delete video.dataset.watched; element("failed").textContent = ""; refresh(); });
  for (const event of ["timeupdate", "seeked", "ended"]) {
    video.addEventListener(event, () => {
      if (!video.dataset.watched && isWatched(video)) { video.dataset.watched = "yes"; refresh(); }
    });
  }
  video.addEventListener("error", () => { element("failed").textContent = "A clip can't be played. Reload the page, or use another browser."; });
}
element("agree").addEventListener("click", () => { begin(); remember(); show(); });
element("next").addEventListener("click", next);
element("save").addEventListener("click", save);
element("another").addEventListener("click", () => { open("consent"); });
element("another").hidden = Boolean(invited); // whoever is invited next has another link
addEventListener("keydown", event => {
  if (element("task").hidden || event.ctrlKey || event.altKey || event.metaKey) return;
  if (KEYS[event.key]) { if (!event.repeat) choose(current, KEYS[event.key]); }
  else if (event.key === "ArrowUp") current = Math.max(current - 1, 0);
  else if (event.key === "Enter" && !chosen.includes(null)) next();
  else return;
  event.preventDefault();
  refresh();
});
recall();
if (state) show(); else open("consent");
