"use strict";
// The chunk viewer. Everything it shows was written by a model or comes from a data set: it reaches the page as text
// (textContent), never as markup. Offsets count Unicode code points, as Python does, so texts are cut as arrays.
(() => {
  const data = JSON.parse(document.getElementById("audit-data").textContent);
  const root = document.getElementById("viewer");
  const rollouts = data.rollouts;
  if (!rollouts.length) return;

  const BINS = 5;
  const CONTEXT = 80; // code points of the prefix that are shown before a chunk
  const LONG = 1500; // code points of a prompt's turn that are shown unfolded
  const VALUE = 2; // nats: the ends of the colours where tokens have values of their own

  /** Whether the teacher scored the student's own tokens, and wrote nothing. */
  const scored = (chunk) => chunk.n_eff === null && !chunk.replies.length && chunk.tokens.length > 0;
  const byToken = rollouts.some((rollout) => rollout.chunks.some(scored));
  const { low, high } = byToken ? { low: -VALUE, high: VALUE } : data.scale;

  /** An element with a class, text or children, and attributes. */
  function make(tag, { className = "", text, children = [], ...attributes } = {}) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  function show(value, digits = 2) {
    if (value === null) return "–";
    return (Number.isInteger(value) ? String(value) : value.toFixed(digits)).replace("-", "−");
  }

  const showScore = (value) => (value === null ? "–" : value.toFixed(2).replace("-", "−"));

  function bin(score) {
    if (score === null) return "";
    const place = Math.floor(((score - low) / (high - low)) * BINS);
    return `s${Math.max(0, Math.min(BINS - 1, place))}`;
  }

  /** Scored tokens, each in the colour of its value: below 0 the update makes it less likely. */
  function shaded(chunk) {
    return chunk.tokens.map((token, index) => {
      const value = chunk.values[index] ?? null;
      const colour = value === null ? "unheard" : bin(value);
      return make("span", { className: colour, text: token, title: show(value, 3) });
    });
  }

  const points = (text) => Array.from(text);
  const join = (array, from, to) => array.slice(from, to).join("");
  const visible = (text) => text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "⇥");
  const verdict = (correct) => (correct === null ? "not checked" : correct ? "✓ correct" : "✗ wrong");

  function meanScore(rollout) {
    const scores = rollout.chunks.map((chunk) => chunk.score).filter((score) => score !== null);
    return scores.length ? scores.reduce((sum, score) => sum + score, 0) / scores.length : null;
  }

  /** The chunks in reading order, each with a sound place in a text of `length` code points, or none. */
  function placed(rollout, length) {
    const chunks = rollout.chunks.map((chunk) => {
      const from = chunk.char_start ?? chunk.prefix_end;
      const sound = from !== null && chunk.char_end !== null && from >= 0 && chunk.char_end <= length;
      return { chunk, from, to: chunk.char_end, sound: sound && from <= chunk.char_end };
    });
    chunks.sort((a, b) => (a.from ?? Infinity) - (b.from ?? Infinity));
    let end = 0;
    for (const item of chunks) {
      item.sound = item.sound && item.from >= end;
      if (item.sound) end = item.to;
    }
    return chunks;
  }

  function legend() {
    const [less, more] = byToken
      ? ["Value of a token, nats: to be less likely", "more likely."]
      : ["Score: the teacher disagrees", "agrees. Dashed: dropped, no signal."];
    const edge = (index) => String(Number((low + ((high - low) * index) / BINS).toFixed(2))).replace("-", "−");
    const items = [...Array(BINS).keys()].map((index) =>
      make("li", { className: `s${index}`, text: `${edge(index)}–${edge(index + 1)}` }));
    return make("div", { className: "scale", children: [
      make("span", { text: less }),
      make("ol", { children: items, "aria-label": "Colours by score" }),
      make("span", { text: more }),
    ] });
  }

  function numbers(chunk) {
    const rows = scored(chunk) ? [
      ["log q − log p", showScore(chunk.score)], ["mean value", show(chunk.weight, 3)],
      ["tokens", show(chunk.tokens.length)],
    ] : [
      ["score", showScore(chunk.score)], ["weight", show(chunk.weight, 3)], ["matches, k", show(chunk.k)],
      ["replies", show(chunk.n_eff)], ["entropy, nats", show(chunk.entropy)],
    ];
    return make("dl", { children: rows.map(([name, value]) =>
      make("div", { children: [make("dt", { text: name }), make("dd", { text: value })] })) });
  }

  /** How many code points of a reply agree with the chunk, from its start: those of the tokens agreed with. */
  function agreedLength(reply, chunk) {
    if (reply.agreed === null) return 0;
    return points(chunk.tokens.slice(0, reply.agreed).join("")).length;
  }

  /** Equal replies once, with their number. */
  function grouped(replies) {
    const groups = new Map();
    for (const reply of replies) {
      const key = JSON.stringify([reply.text, reply.finish, reply.score, reply.agreed]);
      const group = groups.get(key) ?? { reply, times: 0 };
      group.times += 1;
      groups.set(key, group);
    }
    return [...groups.values()];
  }

  function replyItem({ reply, times }, chunk) {
    const said = points(reply.text);
    const cut = agreedLength(reply, chunk);
    const end = Math.max(cut, points(chunk.text).length); // what follows was not compared
    const text = make("div", { className: "text", children: [
      make("mark", { text: join(said, 0, cut), title: "agrees with the student" }), join(said, cut, end),
      make("span", { className: "before", text: join(said, end), title: "past the chunk’s end: not compared" }),
    ] });
    const share = reply.agreed === null ? "" : `agrees with ${reply.agreed} of ${chunk.tokens.length} tokens`;
    const notes = [share, times > 1 ? `${times} times` : "", reply.finish === "length" ? "cut by the token limit" : "",
      reply.text === "" ? "stopped at once" : ""].filter(Boolean);
    const side = make("div", { children: [text, make("small", { text: notes.join(", ") })] });
    if (!cut) text.firstChild.remove();
    return make("li", { children: [
      make("span", { className: "score", text: showScore(reply.score), title: "score of this continuation" }), side] });
  }

  function tokenList(chunk) {
    const size = Math.max(chunk.tokens.length, chunk.values.length);
    const items = [...Array(size).keys()].map((index) =>
      make("li", { children: [
        make("code", { text: visible(chunk.tokens[index] ?? "") || "∅" }),
        make("span", { text: show(chunk.values[index] ?? null, 3) }),
      ] }));
    return make("ol", { className: "tokens", children: items });
  }

  function fillPanel(panel, item, index, total, text) {
    const { chunk } = item;
    const cut = chunk.prefix_end ?? item.from ?? 0;
    const before = join(text, Math.max(0, cut - CONTEXT), cut);
    const place = chunk.start !== null && chunk.end !== null ? `, tokens ${chunk.start} to ${chunk.end - 1}` : "";
    const parts = [
      make("h3", { text: `Chunk ${index + 1} of ${total}${place}` }),
      make("div", { className: "text", children: [
        make("span", { className: "before", text: (cut > CONTEXT ? "…" : "") + before }),
        scored(chunk) && chunk.values.length
          ? make("span", { className: "own", children: shaded(chunk) })
          : make("span", { className: `own ${bin(chunk.score)}`, text: chunk.text || "(end of text)" }),
      ] }),
      numbers(chunk),
    ];
    if (chunk.dropped !== null) parts.push(make("p", { className: "status", text: `Dropped: ${chunk.dropped}` }));
    if (!scored(chunk)) {
      parts.push(make("h4", { text: `The teacher’s continuations (${chunk.replies.length})` }));
      parts.push(chunk.replies.length
        ? make("ul", { className: "replies", children: grouped(chunk.replies).map((group) => replyItem(group, chunk)) })
        : make("p", { className: "none", text: "None." }));
    }
    const rejected = Object.entries(chunk.rejected).map(([reason, times]) => `${reason} (${times})`);
    const without = scored(chunk) ? "Tokens without a signal" : "Rejected";
    if (rejected.length) parts.push(make("p", { className: "hint", text: `${without}: ${rejected.join(", ")}` }));
    if (chunk.tokens.length || chunk.values.length) {
      parts.push(make("h4", { text: chunk.values.length ? "Value on each token" : "Tokens" }), tokenList(chunk));
      if (chunk.values.length && chunk.values.every((value) => value === 0)) {
        parts.push(make("p", { className: "hint", text: "All zero: the update did not weigh the student’s own tokens here." }));
      }
    }
    panel.replaceChildren(...parts);
    panel.scrollTop = 0;
  }

  /** Chunks as buttons within the text. Hover and focus show one; a click or Enter holds it, so the mouse can leave. */
  function wire(node, state, showChunk) {
    const display = () => {
      for (const other of state.nodes) other.classList.toggle("shown", other === node);
      showChunk();
    };
    const hold = (held) => {
      for (const other of state.nodes) {
        other.classList.toggle("held", held && other === node);
        other.setAttribute("aria-pressed", String(held && other === node));
      }
      state.held = held ? node : null;
    };
    node.addEventListener("pointerenter", () => state.held || display());
    node.addEventListener("focus", () => {
      if (state.held && state.held !== node) hold(false);
      display();
    });
    node.addEventListener("click", () => {
      display();
      hold(state.held !== node);
    });
    node.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        node.click();
      } else if (event.key === "Escape" && state.held) hold(false);
    });
    return display;
  }

  function chunkNode(item, index, text) {
    const { chunk } = item;
    const own = item.sound ? join(text, item.from, item.to) : chunk.text;
    const score = chunk.dropped === null ? showScore(chunk.score) : "dropped";
    const shows = scored(chunk) && item.sound && chunk.values.length > 0;
    return make("span", {
      className: `chunk ${chunk.dropped !== null ? "dropped" : shows ? "" : bin(chunk.score)}`,
      ...(shows ? { children: shaded(chunk) } : { text: own.trim() ? own : visible(own) || "(end)" }),
      role: "button", tabindex: "0", "aria-pressed": "false", "aria-controls": "panel", "data-score": score,
      "aria-label": `Chunk ${index + 1}, ${chunk.dropped === null ? `score ${score}` : `dropped: ${chunk.dropped}`}: ${own}`,
    });
  }

  /** The rollout's text with its chunks. What can't be placed in the text follows it, so that nothing is hidden. */
  function response(rollout, panel) {
    const text = points(rollout.text);
    const items = placed(rollout, text.length);
    const state = { nodes: [], held: null };
    const flow = make("p");
    const rest = make("p");
    const displays = [];
    let at = 0;
    items.forEach((item, index) => {
      const node = chunkNode(item, index, text);
      state.nodes.push(node);
      displays.push(wire(node, state, () => fillPanel(panel, item, index, items.length, text)));
      if (item.sound) {
        flow.append(join(text, at, item.from), node);
        at = item.to;
      } else rest.append(node, " ");
    });
    flow.append(join(text, at));
    const first = Math.max(0, items.findIndex((item) => item.chunk.dropped === null));
    if (displays.length) displays[first]();
    else panel.replaceChildren(make("p", { className: "none", text: "No chunk of this rollout was audited." }));
    const said = make("div", { className: "said", children: [make("span", { text: "student" }), flow] });
    if (rest.childNodes.length) said.append(make("span", { text: "chunks without a place in the text" }), rest);
    return said;
  }

  function facts(rollout) {
    const parts = [["Verdict", verdict(rollout.correct)]];
    if (rollout.reference !== null) parts.push(["Reference", rollout.reference]);
    if (rollout.finish) parts.push(["Ended by", rollout.finish === "length" ? "the token limit" : rollout.finish]);
    return make("p", { className: "facts", children: parts.map(([name, value]) =>
      make("span", { children: [`${name} `, make("b", { text: value })] })) });
  }

  /** One turn of the prompt; a long one (few-shot examples) stays folded. */
  function promptTurn(turn) {
    const content = make("p", { text: turn.content });
    const size = points(turn.content).length;
    const folded = () => make("details", { children: [
      make("summary", { text: `${size.toLocaleString("en")} characters` }), content] });
    return make("div", { className: "turn", children: [
      make("span", { text: turn.role }), size > LONG ? folded() : content] });
  }

  const views = make("div", { className: "views" });

  function render(rollout) {
    const panel = make("div", {
      className: "panel", id: "panel", role: "region", tabindex: "0",
      "aria-live": "polite", "aria-label": "What the teacher said about the chunk",
    });
    const turns = rollout.prompt.map(promptTurn);
    const left = make("div", { children: [
      ...turns, response(rollout, panel), facts(rollout),
      make("p", { className: "hint",
        text: "Point at a chunk, or move to it with Tab. A click or Enter holds it; again, or Escape, lets go." }),
    ] });
    views.replaceChildren(left, panel);
  }

  /** The choosers: a step, one of its rollouts, and steps back and forth through all. */
  function chooser() {
    const steps = [...new Set(rollouts.map((rollout) => rollout.step))];
    const stepSelect = make("select", { id: "step" });
    steps.forEach((step, index) => stepSelect.append(make("option", { value: index, text: show(step) })));
    const rolloutSelect = make("select", { id: "rollout" });
    const back = make("button", { type: "button", text: "← Previous", id: "previous" });
    const forth = make("button", { type: "button", text: "Next →", id: "next" });
    const label = (rollout) => `${rollout.prompt_id || "prompt"} · ${verdict(rollout.correct)} · mean score ${showScore(meanScore(rollout))}`;
    const inStep = (step) => rollouts.map((_, index) => index).filter((index) => rollouts[index].step === step);

    function choose(index) {
      const { step } = rollouts[index];
      stepSelect.value = String(steps.indexOf(step));
      rolloutSelect.replaceChildren(...inStep(step).map((other) =>
        make("option", { value: other, text: label(rollouts[other]) })));
      rolloutSelect.value = String(index);
      back.disabled = index === 0;
      forth.disabled = index === rollouts.length - 1;
      render(rollouts[index]);
    }

    stepSelect.addEventListener("change", () => choose(inStep(steps[Number(stepSelect.value)])[0]));
    rolloutSelect.addEventListener("change", () => choose(Number(rolloutSelect.value)));
    back.addEventListener("click", () => choose(Number(rolloutSelect.value) - 1));
    forth.addEventListener("click", () => choose(Number(rolloutSelect.value) + 1));
    const form = make("div", { className: "chooser", children: [
      make("label", { children: ["Step", stepSelect] }),
      make("label", { className: "wide", children: ["Rollout", rolloutSelect] }), back, forth,
    ] });
    return { form, choose };
  }

  const { form, choose } = chooser();
  root.append(form, legend(), views);
  choose(0);
})();
