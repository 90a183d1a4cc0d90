"use strict";
// One moment, 0..1, for all that moves on the page: clips, and what viewer.js adds to `shows`.
const shows = [];
const data = JSON.parse(document.getElementById("data").textContent);

// A clip is a picture of all its frames, row by row.
for (const canvas of document.querySelectorAll("canvas[data-frames]")) {
  const picture = canvas.querySelector("img"), context = canvas.getContext("2d");
  const frames = Number(canvas.dataset.frames), columns = Number(canvas.dataset.columns);
  const show = moment => {
    const frame = Math.min(Math.floor(moment * frames), frames - 1);
    const x = frame % columns * canvas.width, y = Math.floor(frame / columns) * canvas.height;
    context.drawImage(picture, x, y, canvas.width, canvas.height, 0, 0, canvas.width, canvas.height);
  };
  shows.push(show);
  picture.decode().then(() => show(moment), () => {});
}

const bar = { play: document.getElementById("play"), time: document.getElementById("time"), now: document.getElementById("now") };
let moment = 0, playing = !matchMedia("(prefers-reduced-motion: reduce)").matches, before = null;

function showAll() {
  bar.time.value = moment;
  bar.now.textContent = moment.toFixed(2);
  for (const show of shows) show(moment);
}

function play(on) {
  playing = on;
  before = null;
  bar.play.textContent = on ? "\u275a\u275a" : "\u25b6";
}

function tick(now) {
  if (playing) {
    if (before !== null) moment = (moment + (now - before) / 1000 / data.seconds) % 1;
    before = now;
    showAll();
  }
  requestAnimationFrame(tick);
}

function stopAtFragment() {
  const found = /^#t=([0-9.]+)$/.exec(location.hash);
  if (!found) return;
  moment = Math.min(Number(found[1]) || 0, 0.9999);
  play(false);
  showAll();
}

bar.play.addEventListener("click", () => play(!playing));
bar.time.addEventListener("input", () => { play(false); moment = Math.min(Number(bar.time.value), 0.9999); showAll(); });
addEventListener("hashchange", stopAtFragment);
addEventListener("load", () => { play(playing); stopAtFragment(); showAll(); requestAnimationFrame(tick); });
