// Shows the chunks of Q-ARVD Stream Generate as they arrive: each one plays at once, then all of them in order, in a loop.
// Nodes that report in words show their text.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODE = "QARVDStreamGenerate";
const TEXT_NODES = ["QARVDInfo", "QARVDCompare", "QARVDSaveQuantized"];
const players = new WeakMap();

// A node inside subgraphs has an id such as "29:12": one part per level.
function findNode(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

class Player {
  constructor() {
    this.chunks = [];
    this.run = null;
    this.playing = 0;
    this.root = document.createElement("div");
    this.root.className = "qarvd-player";
    this.root.style.cssText =
      "display:flex;flex-direction:column;width:100%;height:100%;min-height:240px;background:#111;border-radius:6px;overflow:hidden;position:relative";
    // Two videos lie over each other: the next chunk loads in the hidden one, so that nothing flickers between chunks.
    this.stage = document.createElement("div");
    this.stage.style.cssText = "position:relative;flex:1 1 0;min-height:0;width:100%";
    this.videos = [0, 1].map(() => {
      const video = Object.assign(document.createElement("video"), { muted: true, playsInline: true });
      video.style.cssText =
        "position:absolute;inset:0;width:100%;height:100%;object-fit:contain;image-rendering:pixelated;visibility:hidden";
      video.addEventListener("loadeddata", () => this.reveal(video));
      video.addEventListener("ended", () => {
        if (video === this.videos[0]) this.play((this.playing + 1) % this.chunks.length);
      });
      this.stage.append(video);
      return video;
    });
    this.still = document.createElement("img");
    this.still.style.cssText =
      "position:absolute;right:6px;top:6px;width:25%;border:1px solid #888;border-radius:3px;image-rendering:pixelated;display:none";
    this.caption = document.createElement("div");
    this.caption.style.cssText = "color:#ddd;font:12px sans-serif;padding:4px 6px;text-align:center";
    this.caption.textContent = "chunks appear here as they are made";
    this.root.append(this.stage, this.still, this.caption);
  }

  add(chunk) {
    if (chunk.run !== this.run) {
      this.run = chunk.run;
      this.chunks = [];
    }
    this.chunks[chunk.index] = chunk;
    this.root.dataset.chunks = this.chunks.length;
    this.play(chunk.index);
    if (this.chunks.length === chunk.total) this.still.style.display = "none";
  }

  all(chunks) {
    if (!chunks?.length || (chunks[0].run === this.run && chunks.length === this.chunks.length)) return;
    chunks.forEach((chunk) => this.add(chunk));
    this.play(0);
  }

  preview(step) {
    if (step.run !== this.run) return;
    this.still.src = step.image;
    this.still.style.display = "";
  }

  play(index) {
    const chunk = this.chunks[index];
    if (!chunk) return;
    this.playing = index;
    const query = new URLSearchParams({ filename: chunk.filename, subfolder: chunk.subfolder, type: chunk.type });
    this.videos[1].src = api.apiURL(`/view?${query}`);
  }

  reveal(video) {
    if (video !== this.videos[1]) return;
    this.videos.reverse();
    video.style.visibility = "visible";
    video.play().catch(() => {});
    this.videos[1].style.visibility = "hidden";
    this.videos[1].pause();
    const chunk = this.chunks[this.playing];
    const made = this.chunks.length;
    const status = made < chunk.total ? `${made} of ${chunk.total} chunks made` : `all ${made} chunks made`;
    this.caption.textContent = `chunk ${this.playing + 1} · ${chunk.frames} frames in ${chunk.seconds.toFixed(2)} s · ${status}`;
  }
}

function playerOf(node) {
  if (!players.has(node)) {
    const player = new Player();
    const widget = node.addDOMWidget("qarvd_video", "video", player.root, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => 240,
    });
    widget.serialize = false;
    players.set(node, player);
  }
  return players.get(node);
}

function showText(node) {
  const box = document.createElement("pre");
  box.className = "qarvd-text";
  box.style.cssText =
    "margin:0;padding:6px;width:100%;height:100%;min-height:80px;box-sizing:border-box;overflow:auto;background:#111;color:#ddd;font:11px monospace;white-space:pre-wrap;border-radius:6px";
  node.addDOMWidget("qarvd_text", "text", box, { serialize: false, hideOnZoom: false, getMinHeight: () => 80 }).serialize = false;
  const onExecuted = node.onExecuted;
  node.onExecuted = function (output) {
    onExecuted?.apply(this, arguments);
    if (output?.text) box.textContent = [].concat(output.text).join("\n");
  };
}

app.registerExtension({
  name: "qarvd.stream",
  nodeCreated(node) {
    if (TEXT_NODES.includes(node.comfyClass)) showText(node);
    if (node.comfyClass !== NODE) return;
    playerOf(node);
    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      playerOf(this).all(output?.qarvd_chunks);
    };
  },
  setup() {
    const toNode = (event, method) => {
      const node = findNode(event.detail.node);
      if (node) playerOf(node)[method](event.detail);
    };
    api.addEventListener("qarvd.chunk", (event) => toNode(event, "add"));
    api.addEventListener("qarvd.step", (event) => toNode(event, "preview"));
  },
});
