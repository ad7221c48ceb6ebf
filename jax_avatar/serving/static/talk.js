// The page's part of a conversation that the avatar holds by itself: captions, and what it did.

const MOST_LINES = 50;
const at = (id) => document.getElementById(id);

function add(who, text, action) {
  const line = document.createElement("p"), name = document.createElement("b");
  name.textContent = who;
  line.className = who === "You" ? "you" : "avatar";
  line.append(name, ` ${text}`);
  if (action) {
    const did = document.createElement("i");
    did.textContent = action;
    line.append(" ", did);
  }
  const list = at("captions");
  list.append(line);
  while (list.childElementCount > MOST_LINES) list.firstElementChild.remove();
  list.scrollTop = list.scrollHeight;
}

// What an answer did: its action, unless that is how the avatar looks anyway.
function did(turn) {
  if (turn.action === turn.stable) return;
  const item = document.createElement("li");
  item.textContent = turn.action;
  at("did").append(item);
  while (at("did").childElementCount > MOST_LINES) at("did").firstElementChild.remove();
  at("did").hidden = false;
}

/** Shows or hides what belongs to a conversation. */
export function beginTalk(created) {
  at("captions").replaceChildren();
  at("did").replaceChildren();
  at("did").hidden = true;
  at("captions").hidden = !created.talks;
  if (!created.talks) return;
  at("text").placeholder = "Type to it";
  at("text").setAttribute("aria-label", "Text to the avatar");
  at("say").textContent = "Send";
  at("textForm").hidden = false;
  at("fileLabel").hidden = at("promptForm").hidden = true;
  at("talk").hidden = !created.listens;
}

// Latency by parts, after the answer's text.
function addTiming({ type, id, at_s, react, ...parts }) {
  const note = document.createElement("small"), last = at("captions").lastElementChild;
  const text = Object.entries(parts).map(([name, s]) => `${name} ${s.toFixed(2)}`).join(" + ");
  note.textContent = `${text} = ${react.toFixed(2)} s`;
  last?.append(" ", note);
  at("captions").scrollTop = at("captions").scrollHeight;
}

/** Takes a message of the server; returns the seconds of an answer if it tells them. */
export function heardTalk(message) {
  if (message.type === "heard") {
    at("message").textContent = "";
    add("You", message.text);
  } else if (message.type === "turn") {
    add("Avatar", message.say, message.action === message.stable ? "" : message.action);
    did(message);
  } else if (message.type === "turn.timing") {
    addTiming(message);
    return message.react.toFixed(2);
  }
  return null;
}

/** Base64 of samples. */
export const encoded = (samples) => btoa(String.fromCharCode(...new Uint8Array(samples.buffer)));
