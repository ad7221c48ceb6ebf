// The page of a live avatar: sound goes up as PCM, video comes down as fragments of MP4.

import { beginTalk, encoded, heardTalk } from "./talk.js";

const at = (id) => document.getElementById(id);
const video = at("video");
const token = new URLSearchParams(location.hash.slice(1)).get("token") || undefined;
const MOST_RECORDED = 500e6; // bytes
const TARGET_DELAY = 0.25; // seconds of video kept in hand

let socket, source, buffer, context, microphone, stream, portrait;
let waiting = [], recorded = [], recordedBytes = 0, muteUntil = 0;
let failure = ""; // the error that ended the session
let created, frames = 0, spokeAt = 0, reaction = null, playingFile = null;
let latency = null; // of the latest answer in a conversation

const say = (text) => { at("message").textContent = text; };
const send = (type, fields = {}) => {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ type, ...fields }));
};

// ---- portrait -------------------------------------------------------

function choose(file) {
  if (!file?.type.startsWith("image/")) return;
  if (file.size > 8e6) return say("This picture is larger than 8 MB.");
  portrait = file;
  at("preview").src = URL.createObjectURL(file);
  at("preview").hidden = false;
  at("preview").alt = file.name;
  at("hint").hidden = true;
  at("consentRow").hidden = false;
  at("face").value = ""; // that of another picture
  at("go").disabled = !at("consent").checked;
}

at("portrait").onchange = (event) => choose(event.target.files[0]);
at("consent").onchange = () => { at("go").disabled = !at("consent").checked; };
const drop = at("drop");
drop.ondragover = (event) => { event.preventDefault(); drop.classList.add("over"); };
drop.ondragleave = () => drop.classList.remove("over");
drop.ondrop = (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  choose(event.dataTransfer.files[0]);
};
for (const [label, input] of [["drop", "portrait"], ["fileLabel", "file"]]) {
  at(label).onkeydown = (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); at(input).click(); }
  };
}

// Which face, and how much of the picture: only where the model frames by the face.
fetch("readyz").then((answer) => answer.json()).then((server) => {
  at("viewRow").hidden = server.framing !== "face";
}).catch(() => {});

const base64 = (file) => new Promise((done, failed) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result.split(",")[1]);
  reader.onerror = () => failed(reader.error);
  reader.readAsDataURL(file);
});

// ---- session --------------------------------------------------------

at("go").onclick = async () => {
  at("go").disabled = true;
  failure = "";
  say("Connecting …");
  try {
    context = context || new AudioContext(); // sound needs this click
    await context.resume();
    await connect();
  } catch (error) { stopped(String(error.message || error)); }
};

async function connect() {
  const picture = portrait && (await base64(portrait));
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  socket = new WebSocket(`${scheme}//${location.host}/v1/avatar`);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => send("session.create", {
    version: 1, token, portrait: picture, consent: picture ? true : undefined,
    face: at("face").valueAsNumber || undefined, frame: at("full").checked ? "full" : undefined,
    sample_rate: context.sampleRate,
  });
  socket.onmessage = (event) => {
    if (typeof event.data === "string") heard(JSON.parse(event.data));
    else append(event.data);
  };
  socket.onclose = () => stopped("The session is over.");
}

function heard(message) {
  if (message.type === "session.created") begin(message);
  else if (message.type === "error") {
    if (message.fatal) failure = message.message;
    say(message.message);
  }
  else if (message.type === "session.closed") stopped(`The session is over: ${message.reason}.`);
  else if (message.type === "draining") say("The server is about to stop.");
  else if (message.type === "cleared" || message.type === "interrupted") {
    muteUntil = message.at_s + created.delay_s;
    video.muted = true;
  } else if (message.type === "playback_started" && spokeAt) {
    reaction = [message.at_s + created.delay_s, spokeAt];
    spokeAt = 0;
  } else if (message.type === "state") document.body.dataset.state = message.state;
  else latency = heardTalk(message) ?? latency;
}

function begin(message) {
  created = message;
  waiting = []; recorded = []; recordedBytes = frames = 0;
  source = new MediaSource();
  video.src = URL.createObjectURL(source);
  source.onsourceopen = () => {
    buffer = source.addSourceBuffer(message.mime);
    buffer.onupdateend = next;
    next();
  };
  video.play().catch(() => say("Press Start again to allow sound."));
  at("start").hidden = true;
  at("bar").hidden = false;
  at("textForm").hidden = !message.takes_text;
  at("promptForm").hidden = !message.takes_prompt;
  say(message.warnings.join(" "));
  beginTalk(message);
  if (message.listens) openTalk();
  else if (message.talks) at("text").focus();
  else at("talk").focus();
}

function append(data) {
  waiting.push(data);
  if (recordedBytes + data.byteLength <= MOST_RECORDED) {
    recorded.push(data);
    recordedBytes += data.byteLength;
  }
  next();
}

function next() {
  if (!buffer || buffer.updating || source.readyState !== "open") return;
  const have = video.buffered;
  if (have.length && video.currentTime - have.start(0) > 30) {
    buffer.remove(0, video.currentTime - 10); // hours must fit into memory
  } else if (waiting.length) {
    buffer.appendBuffer(waiting.shift());
  }
}

// Stay near the newest frame, by going a little faster, or by a jump where far behind.
function follow() {
  requestAnimationFrame(follow);
  const have = video.buffered;
  if (!created || !have.length) return;
  const behind = have.end(have.length - 1) - video.currentTime;
  if (video.currentTime < have.start(0)) video.currentTime = have.start(0);
  if (behind > 1.5) video.currentTime = have.end(have.length - 1) - TARGET_DELAY;
  else video.playbackRate = behind > 2 * TARGET_DELAY ? 1.05 : 1;
  if (muteUntil && video.currentTime >= muteUntil) { muteUntil = 0; video.muted = false; }
  if (reaction && video.currentTime >= reaction[0]) {
    document.body.dataset.reaction = ((performance.now() - reaction[1]) / 1000).toFixed(2);
    reaction = null;
  }
}
requestAnimationFrame(follow);

if (video.requestVideoFrameCallback) {
  const count = () => { frames++; video.requestVideoFrameCallback(count); };
  video.requestVideoFrameCallback(count);
}
let counted = 0;
setInterval(() => {
  if (!created) return;
  const have = video.buffered;
  const behind = have.length ? have.end(have.length - 1) - video.currentTime : 0;
  const reacted = document.body.dataset.reaction;
  at("figures").textContent = `${frames - counted} FPS · ${Math.round(behind * 1000)} ms in hand`
    + (latency || reacted ? ` · answered in ${latency || reacted} s` : "");
  document.body.dataset.frames = frames;
  counted = frames;
}, 1000);

function stopped(text) {
  endTalk();
  socket?.close();
  socket = buffer = created = null;
  say(failure || text);
  at("bar").hidden = true;
  at("start").hidden = false;
  at("figures").textContent = "";
  at("captions").hidden = at("did").hidden = true;
  latency = null;
  at("go").disabled = Boolean(portrait) && !at("consent").checked;
}

// ---- speech ---------------------------------------------------------

async function openMicrophone() {
  if (microphone) return;
  stream = await navigator.mediaDevices.getUserMedia({
    audio: { echoCancellation: true, noiseSuppression: true },
  });
  await context.audioWorklet.addModule("microphone.js");
  microphone = new AudioWorkletNode(context, "microphone");
  context.createMediaStreamSource(stream).connect(microphone);
  microphone.port.onmessage = (event) => {
    if (talking && socket?.readyState === WebSocket.OPEN) {
      spokeAt = spokeAt || startedAt;
      startedAt = 0;
      if (created.talks) send("user.append", { audio: encoded(event.data) });
      else socket.send(event.data.buffer);
    }
  };
}

let talking = false, startedAt = 0;
async function talk() {
  if (talking || !created) return;
  talking = true;
  at("talk").setAttribute("aria-pressed", "true");
  at("talk").textContent = "Listening …";
  startedAt = performance.now();
  try { await openMicrophone(); } catch { endTalk(); say("The microphone cannot be used."); }
}

function endTalk() {
  if (!talking) return;
  talking = false;
  at("talk").setAttribute("aria-pressed", "false");
  at("talk").textContent = created?.talks ? "Microphone is off" : "Hold to talk";
  send(created?.talks ? "user.commit" : "audio.commit");
}

// In a conversation the microphone stays open; the button switches it off and on.
async function openTalk() {
  await talk();
  if (talking) at("talk").textContent = "Microphone is on";
}
const switchTalk = () => (talking ? endTalk() : openTalk());

const button = at("talk");
const isHeld = (handle) => (event) => { if (!created?.talks) handle(event); };
button.onclick = () => { if (created?.talks) switchTalk(); };
button.onpointerdown = isHeld((event) => { button.setPointerCapture(event.pointerId); talk(); });
button.onpointerup = button.onpointercancel = isHeld(endTalk);
button.oncontextmenu = (event) => event.preventDefault();
button.onkeydown = isHeld((event) => {
  if (!event.repeat && (event.key === " " || event.key === "Enter")) talk();
});
button.onkeyup = button.onblur = isHeld(endTalk);

function interrupt() {
  if (!created) return;
  clearInterval(playingFile);
  video.muted = true; // at once; what comes after the interrupt is heard again
  muteUntil = muteUntil || Infinity;
  send("clear");
}
at("interrupt").onclick = interrupt;
document.onkeydown = (event) => { if (event.key === "Escape") interrupt(); };

at("file").onchange = async (event) => {
  const file = event.target.files[0];
  event.target.value = "";
  if (!file || !created) return;
  try {
    const sound = await context.decodeAudioData(await file.arrayBuffer());
    playFile(sound.getChannelData(0), sound.sampleRate);
  } catch { say("This file holds no sound that can be played."); }
};

// A little faster than it is spoken, so that an hour does not have to wait on the server.
function playFile(samples, rate) {
  clearInterval(playingFile);
  let sent = 0;
  const began = performance.now();
  spokeAt = began;
  const push = () => {
    const ahead = Math.floor(((performance.now() - began) / 1000 * 1.1 + 2) * rate);
    const until = Math.min(samples.length, ahead);
    while (sent < until && socket?.readyState === WebSocket.OPEN) {
      const piece = samples.subarray(sent, Math.min(until, sent + rate / 5));
      socket.send(Int16Array.from(piece, (x) => Math.max(-1, Math.min(1, x)) * 32767).buffer);
      sent += piece.length;
    }
    if (sent >= samples.length || !created) {
      clearInterval(playingFile);
      send("audio.commit");
    }
  };
  playingFile = setInterval(push, 200);
  push();
}

at("textForm").onsubmit = (event) => {
  event.preventDefault();
  const text = at("text").value.trim();
  if (!text) return;
  at("text").value = "";
  spokeAt = performance.now();
  send(created?.talks ? "user.text" : "speech.create", { text });
};

at("promptForm").onsubmit = (event) => {
  event.preventDefault();
  send("prompt.update", { text: at("prompt").value });
};

const save = at("save");
save.onclick = () => {
  if (!recorded.length) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(recorded, { type: "video/mp4" }));
  link.download = "avatar.mp4";
  link.click();
};
save.onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") save.click(); };
at("leave").onclick = () => { send("close"); };
