// Shows the chunks of Q-ARVD Stream Generate as they arrive: each one plays at once, then all of them in a loop.
// Nodes with a text output show their text.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const STREAM = "QARVDStreamGenerate";
const TEXT_NODES = ["QARVDInfo", "QARVDCompare", "QARVDSaveQuantized"];
// Their seeds must not change after a run: a new seed means a new calibration, which takes long.
const FIXED_SEEDS = ["QARVDQuantize", "QARVDCalibrationPrompts"];
// Widget types of our own: the name of a type that Nodes 2.0 knows, such as "text", would show its own input instead.
const PLAYER_TYPE = "qarvd_player";
const TEXT_TYPE = "qarvd_text";
const PLAYER_HEIGHT = 240;
const BAR_HEIGHT = 32;
const DEGREES = 0.1; // that the camera turns per pixel that the mouse is dragged
const MARGINS = 20; // that the canvas leaves above and below

const players = new WeakMap(); // node -> Player; nodes are built again whenever their tab is opened
const runs = new Map(); // graph and node -> the latest run, whichever tab is open

const graphId = () => (app.rootGraph ?? app.graph)?.id ?? null;
const keyOf = (run) => `${run.workflow ?? null} ${run.node}`;

// A node inside subgraphs has an id such as "29:12", one part per level; in stored outputs it is the subgraph's own id
// and then the node's.
function findNode(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    const subgraph = graph?.subgraphs?.get?.(part);
    node = subgraph ? null : (graph?.getNodeById(part) ?? graph?.getNodeById(Number(part)));
    graph = subgraph ?? node?.subgraph;
  }
  return node;
}

// Takes in what an event or the server says of a run. `chunks` may have come before, and in any order.
function learn(status, chunks = []) {
  const known = runs.get(keyOf(status));
  const run = known?.run === status.run ? known : { made: new Map() };
  chunks.forEach((chunk) => run.made.set(chunk.index, chunk));
  const ended = run.state && run.state !== "running";
  Object.assign(run, {
    run: status.run,
    workflow: status.workflow ?? null,
    node: status.node,
    total: status.total,
    state: ended ? run.state : status.state, // an answer may be older than the last event
    finishing: status.finishing || run.finishing,
    keys: status.keys?.length ? status.keys : (run.keys ?? []),
    count: Math.max(status.made, run.count ?? 0),
  });
  runs.set(keyOf(run), run);
  return run;
}

const post = (path, data) =>
  api.fetchApi(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(data) });

function playerFor(run) {
  if ((run.workflow ?? null) !== graphId()) return null; // another tab's
  const node = findNode(run.node);
  return node?.comfyClass === STREAM ? playerOf(node) : null;
}

// Lines of 16 x 16 pictures.
const ICONS = {
  pause: "M5 3v10M11 3v10",
  play: "M4 2.5l9 5.5-9 5.5z",
  save: "M8 2v8M4.5 7L8 10.5 11.5 7M3 13.5h10",
  fullscreen: "M2 6V2h4M10 2h4v4M14 10v4h-4M6 14H2v-4",
};

function setIcon(button, name, title) {
  const svg = 'width="16" height="16" fill="none" stroke="currentColor" stroke-width="1.6"';
  button.innerHTML = `<svg ${svg}><path d="${ICONS[name]}"/></svg>`;
  button.title = title;
  button.setAttribute("aria-label", title);
}

function makeButton(name, press) {
  const made = Object.assign(document.createElement("button"), { type: "button", className: `qarvd-${name}` });
  made.style.cssText =
    "background:none;border:0;color:#ddd;font:12px sans-serif;padding:3px 5px;cursor:pointer;white-space:nowrap;" +
    "flex:none;line-height:0";
  made.addEventListener("click", press);
  made.addEventListener("pointerdown", (event) => event.stopPropagation()); // would drag the node
  return made;
}

const CAPTIONS = {
  running: (run) => `${run.count} of ${run.total} chunks made`,
  done: (run) => `all ${run.count} chunks made`,
  early: (run) => `finished early after ${run.count} of ${run.total} chunks`,
  stopped: (run) => `stopped after ${run.count} of ${run.total} chunks`,
  failed: (run) => `failed after ${run.count} of ${run.total} chunks`,
};

class Player {
  constructor() {
    this.run = null;
    this.playing = null; // index of the chunk
    this.paused = false;
    this.root = document.createElement("div");
    this.root.className = "qarvd-player";
    this.root.style.cssText =
      "display:flex;flex-direction:column;width:100%;height:100%;background:#111;border-radius:6px;overflow:hidden;" +
      "position:relative";
    // Two videos lie over each other: the next chunk loads in the hidden one, so that nothing flickers between chunks.
    this.stage = document.createElement("div");
    this.stage.style.cssText = "position:relative;flex:1 1 0;min-height:0;width:100%";
    this.videos = [0, 1].map(() => {
      const video = Object.assign(document.createElement("video"), { muted: true, playsInline: true });
      video.style.cssText =
        "position:absolute;inset:0;width:100%;height:100%;object-fit:contain;image-rendering:pixelated;" +
        "visibility:hidden";
      video.addEventListener("loadeddata", () => this.reveal(video));
      video.addEventListener("ended", () => video === this.videos[0] && this.play(this.next()));
      video.addEventListener("error", () => video === this.videos[1] && video.src && this.lost());
      this.stage.append(video);
      return video;
    });
    this.still = document.createElement("img");
    this.still.style.cssText =
      "position:absolute;right:6px;top:6px;width:25%;border:1px solid #888;border-radius:3px;" +
      "image-rendering:pixelated;display:none";
    this.stage.append(this.still);
    this.root.append(this.stage, this.makeBar());
    this.listen();
    this.describe();
  }

  // Keys that are held while the player has the focus, and dragging, steer a world model from its next chunk on.
  listen() {
    this.held = new Set();
    this.root.tabIndex = 0;
    const steers = () => this.run?.state === "running" && this.run.keys?.length;
    const press = (event) => {
      const key = event.key.toLowerCase();
      if (!steers() || !this.run.keys.includes(key)) return;
      event.preventDefault();
      event.stopPropagation(); // the canvas has keys of its own
      const known = this.held.has(key);
      if (event.type === "keydown") this.held.add(key);
      else this.held.delete(key);
      if (known !== this.held.has(key)) this.steer();
    };
    this.root.addEventListener("keydown", press);
    this.root.addEventListener("keyup", press);
    this.root.addEventListener("blur", () => {
      if (!this.held.size) return;
      this.held.clear();
      this.steer();
    });
    this.stage.addEventListener("pointerdown", (event) => {
      if (!steers()) return;
      event.stopPropagation(); // would drag the node
      this.root.focus();
      this.stage.setPointerCapture(event.pointerId);
      this.drag = [event.clientX, event.clientY];
    });
    this.stage.addEventListener("pointerup", (event) => {
      if (!this.drag) return;
      const [x, y] = this.drag;
      this.drag = null;
      const turn = [(event.clientX - x) * DEGREES, (y - event.clientY) * DEGREES];
      if (steers() && turn.some(Boolean)) this.steer(turn);
    });
  }

  steer(mouse = [0, 0]) {
    if (this.run?.state === "running") {
      post("/qarvd/controls", { run: this.run.run, keys: [...this.held].join(" "), mouse });
    }
    this.describe();
  }

  makeBar() {
    this.caption = document.createElement("div");
    this.caption.className = "qarvd-caption";
    this.caption.style.cssText = "color:#ddd;font:12px sans-serif;padding:4px 6px;flex:1 1 0;min-width:0";
    this.pauseButton = makeButton("pause", () => this.pause(!this.paused));
    this.saveButton = makeButton("save", () => this.save());
    this.screenButton = makeButton("fullscreen", () =>
      document.fullscreenElement ? document.exitFullscreen() : this.root.requestFullscreen(),
    );
    this.finishButton = makeButton("finish", () => this.finish());
    setIcon(this.pauseButton, "pause", "Pause");
    setIcon(this.saveButton, "save", "Save the chunks made so far as one video");
    setIcon(this.screenButton, "fullscreen", "Full screen");
    this.finishButton.textContent = "Finish";
    this.finishButton.title = "Finish after this chunk and pass the chunks made so far to the connected nodes";
    this.finishButton.style.cssText += ";background:#444;border-radius:4px;line-height:16px";
    const bar = document.createElement("div");
    bar.style.cssText = "display:flex;align-items:center;flex:none;min-height:30px;padding-right:4px";
    bar.append(this.caption, this.finishButton, this.pauseButton, this.saveButton, this.screenButton);
    return bar;
  }

  // Shows a run as far as it is known; `latest` is the index of a chunk that has just arrived.
  show(run, latest) {
    const fresh = run.run !== this.run?.run;
    this.run = run;
    if (fresh) {
      this.playing = null;
      this.videos.forEach((video) => {
        video.removeAttribute("src");
        video.style.visibility = "hidden";
      });
      this.pause(false);
      this.still.style.display = "none";
    }
    this.root.dataset.chunks = run.made.size;
    if (run.state !== "running" || run.count === run.total) this.still.style.display = "none";
    if (run.made.size && (this.playing === null || (latest !== undefined && !this.paused))) {
      this.play(latest ?? Math.min(...run.made.keys()));
    }
    this.describe();
  }

  preview(image) {
    this.still.src = image;
    this.still.style.display = "";
  }

  // With `preview` off or as pictures there is nothing to play, only to say and to finish.
  setVideo(shown) {
    this.stage.style.display = shown ? "" : "none";
    [this.pauseButton, this.saveButton, this.screenButton].forEach((control) => (control.hidden = !shown));
    this.height = shown ? PLAYER_HEIGHT : BAR_HEIGHT;
    this.root.style.minHeight = `${this.height}px`;
    this.root.style.maxHeight = shown ? "" : this.root.style.minHeight;
  }

  next() {
    const made = [...this.run.made.keys()].sort((a, b) => a - b);
    return made.find((index) => index > this.playing) ?? made[0];
  }

  play(index) {
    const chunk = this.run.made.get(index);
    if (!chunk) return;
    this.playing = index;
    const query = new URLSearchParams({ filename: chunk.filename, subfolder: chunk.subfolder, type: chunk.type });
    this.videos[1].src = api.apiURL(`/view?${query}`);
  }

  reveal(video) {
    if (video !== this.videos[1]) return;
    this.videos.reverse();
    video.style.visibility = "visible";
    if (!this.paused) video.play().catch(() => {});
    this.videos[1].style.visibility = "hidden";
    this.videos[1].pause();
    this.describe();
  }

  pause(paused) {
    this.paused = paused;
    setIcon(this.pauseButton, paused ? "play" : "pause", paused ? "Play" : "Pause");
    const video = this.videos[0];
    if (paused) video.pause();
    else if (video.ended) this.play(this.next());
    else if (video.src) video.play().catch(() => {});
  }

  save() {
    if (!this.run?.made.size) return;
    const link = document.createElement("a");
    link.href = api.apiURL(`/qarvd/video?run=${this.run.run}`);
    link.download = `qarvd_${this.run.run}.mp4`;
    link.click();
  }

  finish() {
    this.finishButton.disabled = true;
    post("/qarvd/finish", { run: this.run.run });
  }

  lost() {
    this.caption.textContent = "the chunks no longer exist; run again to see them";
  }

  describe() {
    const run = this.run;
    const running = run?.state === "running";
    this.finishButton.hidden = !running;
    this.finishButton.disabled = Boolean(run?.finishing);
    this.finishButton.style.opacity = this.finishButton.disabled ? 0.5 : 1;
    for (const control of [this.pauseButton, this.saveButton, this.screenButton]) {
      control.disabled = !run?.made.size;
      control.style.opacity = control.disabled ? 0.4 : 1;
    }
    if (!run) {
      this.caption.textContent = "chunks appear here as they are made";
      return;
    }
    const chunk = run.made.get(this.playing);
    const shown = chunk ? `chunk ${chunk.index + 1} · ${chunk.frames} frames in ${chunk.seconds.toFixed(2)} s · ` : "";
    const finishing = running && run.finishing ? "; finishing after this one" : "";
    const hint = this.held.size ? [...this.held].join(" ") : "click and use W A S D Q E and the arrows";
    const keys = running && run.keys?.length ? ` · ${hint}` : "";
    this.caption.textContent = shown + CAPTIONS[run.state](run) + finishing + keys;
  }
}

function playerOf(node) {
  if (!players.has(node)) {
    const player = new Player();
    players.set(node, player);
    player.setVideo(true);
    const widget = node.addDOMWidget("qarvd_video", PLAYER_TYPE, player.root, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => player.height + MARGINS,
    });
    widget.serialize = false;
    const preview = node.widgets.find((w) => w.name === "preview");
    const callback = preview?.callback;
    if (preview) {
      preview.callback = function () {
        callback?.apply(this, arguments);
        const before = player.height;
        fit(node);
        node.setSize([node.size[0], node.size[1] + player.height - before]);
      };
    }
  }
  return players.get(node);
}

// The player as large as the node's `preview` asks for.
function fit(node) {
  playerOf(node).setVideo((node.widgets.find((w) => w.name === "preview")?.value ?? "video") === "video");
}

function showText(node) {
  const box = document.createElement("pre");
  box.className = "qarvd-text";
  box.style.cssText =
    "margin:0;padding:6px;width:100%;height:100%;min-height:60px;box-sizing:border-box;overflow:auto;" +
    "background:#111;color:#ddd;font:11px monospace;white-space:pre-wrap;border-radius:6px;user-select:text";
  const options = { serialize: false, hideOnZoom: false, getMinHeight: () => 60 + MARGINS };
  node.addDOMWidget("qarvd_text", TEXT_TYPE, box, options).serialize = false;
  node.qarvdText = (output) => {
    if (output?.text) box.textContent = [].concat(output.text).join("\n");
  };
  const onExecuted = node.onExecuted;
  node.onExecuted = function (output) {
    onExecuted?.apply(this, arguments);
    this.qarvdText(output);
  };
}

// Shows the output of a stream node. The page hands outputs to the node of the open tab with that id, but they belong
// to the graph of their prompt; a cached result was made for another prompt.
async function showOutput({ prompt_id, node, output }) {
  const status = output?.qarvd_stream?.[0];
  if (!status) return;
  let workflow = status.workflow;
  if (prompt_id !== status.prompt) {
    const answer = await post("/qarvd/cached", { prompt: prompt_id, run: status.run });
    workflow = (await answer.json()).workflow;
  }
  const run = learn({ ...status, workflow, node }, output.qarvd_chunks ?? []);
  playerFor(run)?.show(run);
}

// Nodes that were just built show what is known of their graph, also what was made before the page was loaded.
async function restore() {
  const workflow = graphId();
  const nodes = [];
  const gather = (graph) => {
    for (const node of graph?.nodes ?? graph?._nodes ?? []) {
      if (node.comfyClass === STREAM) nodes.push(node);
      if (node.subgraph) gather(node.subgraph);
    }
  };
  gather(app.rootGraph ?? app.graph);
  if (!nodes.length) return;
  nodes.forEach(fit);
  if (workflow === null) return;
  const show = () => [...runs.values()].forEach((run) => playerFor(run)?.show(run));
  show();
  const answer = await api.fetchApi(`/qarvd/streams?${new URLSearchParams({ workflow })}`);
  if (!answer.ok) return;
  for (const { chunks, ...status } of await answer.json()) {
    const known = runs.get(keyOf(status));
    if (known && known.run !== status.run && !known.fromServer) continue;
    learn(status, chunks).fromServer = !known || known.fromServer;
  }
  show();
}

app.registerExtension({
  name: "qarvd.stream",
  nodeCreated(node) {
    if (TEXT_NODES.includes(node.comfyClass)) showText(node);
    if (FIXED_SEEDS.includes(node.comfyClass)) {
      const control = node.widgets?.find((w) => w.name === "control_after_generate");
      if (control) control.value = "fixed"; // a saved workflow's own choice is set after this
    }
    if (node.comfyClass === STREAM) playerOf(node);
  },
  afterConfigureGraph: restore,
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs ?? {})) findNode(id)?.qarvdText?.(output);
  },
  setup() {
    api.addEventListener("executed", ({ detail }) => showOutput(detail));
    api.addEventListener("qarvd.stream", ({ detail }) => {
      const run = learn(detail);
      playerFor(run)?.show(run);
    });
    api.addEventListener("qarvd.chunk", ({ detail }) => {
      const run = learn(detail, [detail]);
      playerFor(run)?.show(run, detail.index);
    });
    api.addEventListener("qarvd.step", ({ detail }) => {
      const run = learn(detail);
      const player = playerFor(run);
      if (player && player.run !== run) player.show(run);
      player?.preview(detail.image);
    });
  },
});
