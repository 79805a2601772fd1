"use strict";
// The page's own script. `vegaEmbed` draws; this unpacks the data and answers to pointer and keys.
(async () => {
  const $ = (id) => document.getElementById(id);
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children); // strings become text, never markup
    return element;
  };
  const percent = (weight) => (100 * weight).toFixed(weight < 0.095 && weight > 0 ? 1 : 0) + " %";

  const unpack = async () => {
    const packed = Uint8Array.from(atob($("data").textContent), (character) => character.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };

  const data = await unpack();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const checkpoints = data.checkpoints.map((checkpoint) => {
    const bytes = Uint8Array.from(atob(checkpoint.tokenWeights), (character) => character.charCodeAt(0));
    const starts = [0];
    checkpoint.reads.forEach((read) => starts.push(starts[starts.length - 1] + read.sources.length));
    return { ...checkpoint, bytes, starts, perHead: starts[starts.length - 1] };
  });
  const first = checkpoints[0];
  const state = { read: first.reads.length - 1, token: null, head: 0 };

  // -- weights --

  const sameTokens = (checkpoint) =>
    checkpoint.tokens.length === first.tokens.length && checkpoint.tokens.every((token, i) => token === first.tokens[i]);
  checkpoints.forEach((checkpoint) => (checkpoint.hasTokens = sameTokens(checkpoint)));

  const meanOf = (checkpoint, read) => {
    const head = Math.min(state.head, checkpoint.heads - 1);
    return checkpoint.mean[head].slice(checkpoint.starts[read], checkpoint.starts[read + 1]);
  };
  const tokenOf = (checkpoint, read, token) => {
    const head = Math.min(state.head, checkpoint.heads - 1);
    const start = (token * checkpoint.heads + head) * checkpoint.perHead;
    return Array.from(
      checkpoint.bytes.subarray(start + checkpoint.starts[read], start + checkpoint.starts[read + 1]), (byte) => byte / 255);
  };
  const weightsOf = (checkpoint, read) =>
    state.token === null || !checkpoint.hasTokens ? meanOf(checkpoint, read) : tokenOf(checkpoint, read, state.token);
  const readOf = (checkpoint) => Math.min(state.read, checkpoint.reads.length - 1);

  const cellsOf = (checkpoint) =>
    checkpoint.reads.flatMap((read, index) => {
      const weights = weightsOf(checkpoint, index);
      return read.sources.map((source, i) => ({
        kind: read.kind, row: read.row, read: index, place: read.place, source,
        name: checkpoint.sources[source].name, weight: weights[i],
      }));
    });
  const topOf = (cells) => cells.reduce((top, cell) => (cell.read > 0 ? Math.max(top, cell.weight) : top), 0.01);

  // -- drawing --

  const fit = (spec, width) => {
    // Panels get narrower on a narrow page; fonts stay as they are.
    const factor = Math.min(1.35, Math.max(0.4, (width - 150) / (2 * data.panel)));
    const walk = (node) => {
      if (Array.isArray(node)) return node.map(walk);
      if (node === null || typeof node !== "object") return node;
      return Object.fromEntries(
        Object.entries(node).map(([key, value]) => {
          if (key === "values" || key === "datasets") return [key, value];
          if (key === "width" && typeof value === "number") return [key, Math.round(value * factor)];
          if (key === "title" && factor < 0.75 && String(value).startsWith("source (")) return [key, "source"];
          if (key === "x" && value.value === data.panel) return [key, { value: Math.round(value.value * factor) }];
          return [key, walk(value)];
        }));
    };
    const { title, ...fitted } = walk(spec); // the page has the title already
    return fitted;
  };
  const embed = (element, spec) =>
    vegaEmbed(element, fit(spec, element.clientWidth), {
      actions: false, renderer: "svg", config: { aria: false, ...data.themes[dark.matches ? "dark" : "light"] },
      tooltip: { theme: dark.matches ? "dark" : "light" },
    });

  const drawMaps = () =>
    Promise.all(checkpoints.map(async (checkpoint) => {
      checkpoint.result?.finalize();
      const cells = cellsOf(checkpoint);
      checkpoint.result = await embed(checkpoint.chart, { ...checkpoint.spec, datasets: { ...checkpoint.spec.datasets, cells } });
      checkpoint.result.view.addEventListener("mouseover", (event, item) => {
        if (Number.isInteger(item?.datum?.read)) choose({ read: item.datum.read });
      });
      await update(checkpoint, cells);
    }));
  const update = (checkpoint, cells) => {
    const view = checkpoint.result.view.signal("chosen", readOf(checkpoint));
    if (cells) view.data("cells", cells).signal("top", topOf(cells));
    return view.runAsync();
  };

  const drawn = new Map();
  const drawFigure = async (element) => {
    drawn.get(element)?.finalize();
    drawn.set(element, await embed(element, data.figures[Number(element.dataset.figure)].spec));
  };
  const observer = new IntersectionObserver((entries) =>
    entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
      observer.unobserve(entry.target);
      drawFigure(entry.target).catch(report);
    }), { rootMargin: "800px" });

  // -- the chosen read, token and head --

  const profileOf = (checkpoint) => {
    const index = readOf(checkpoint), read = checkpoint.reads[index], weights = weightsOf(checkpoint, index);
    const mean = meanOf(checkpoint, index), isToken = state.token !== null && checkpoint.hasTokens;
    const even = 1 / weights.length, scale = 100 / Math.max(...weights, ...mean, 2 * even);
    const rows = read.sources.map((source, i) => {
      const { name, detail } = checkpoint.sources[source];
      const fill = make("div", { className: "fill" }), tick = make("div", { className: "even" });
      fill.style.width = scale * weights[i] + "%";
      tick.style.left = scale * even + "%";
      return make("tr", {},
        make("th", { scope: "row", title: detail }, name),
        make("td", { className: "bar" }, make("div", { className: "track" }, fill, tick)),
        make("td", { className: "number" }, percent(weights[i])),
        ...(isToken ? [make("td", { className: "number", title: "mean of all tokens" }, percent(mean[i]))] : []));
    });
    const head = ["source", "", isToken ? "token" : "mean", ...(isToken ? ["mean"] : [])];
    return make("div", {},
      ...(checkpoints.length > 1 ? [make("strong", {}, checkpoint.name)] : []),
      make("table", {},
        make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)))),
        make("tbody", {}, ...rows)));
  };
  const showProfile = () => {
    const text = first.reads[readOf(first)].text;
    $("profile").replaceChildren(
      make("h3", {}, text[0].toUpperCase() + text.slice(1)),
      make("div", { className: "profiles" }, ...checkpoints.map(profileOf)),
      make("p", { className: "note" }, "The tick marks an even share."));
  };
  const showTokens = () => {
    const read = readOf(first), mean = meanOf(first, read), color = dark.matches ? "86,180,233" : "0,114,178";
    [...$("tokens").children].forEach((button, token) => {
      const weights = tokenOf(first, read, token);
      const distance = weights.reduce((sum, weight, i) => sum + Math.abs(weight - mean[i]), 0) / 2;
      button.style.background = `rgba(${color},${Math.min(0.75, 1.5 * distance).toFixed(3)})`;
      button.setAttribute("aria-selected", String(token === state.token));
    });
    $("mean").setAttribute("aria-pressed", String(state.token === null));
    $("token-name").textContent = state.token === null ? "" : `Token ${state.token}: “${first.tokens[state.token]}”`;
  };
  const choose = (changes) => {
    const before = { ...state };
    Object.assign(state, changes);
    if (Object.keys(state).every((key) => state[key] === before[key])) return;
    const redraws = state.token !== before.token || state.head !== before.head;
    checkpoints.forEach((checkpoint) => update(checkpoint, redraws && cellsOf(checkpoint)).catch(report));
    showProfile();
    showTokens();
  };

  // -- the page --

  const report = (error) => {
    $("problem").hidden = false;
    $("problem").textContent = `The figures could not be drawn: ${error}`;
    console.error(error);
  };
  const onMapKey = (event) => {
    const last = first.reads.length - 1;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -first.perLayer, ArrowDown: first.perLayer, Home: -last, End: last };
    if (event.key === "Escape") choose({ token: null });
    else if (event.key in steps) choose({ read: Math.min(last, Math.max(0, state.read + steps[event.key])) });
    else return;
    event.preventDefault();
  };
  const focusToken = (token) => {
    const buttons = [...$("tokens").children];
    const target = Math.min(buttons.length - 1, Math.max(0, token));
    buttons.forEach((button, i) => (button.tabIndex = i === target ? 0 : -1));
    buttons[target]?.focus();
  };
  const onTokenKey = (event) => {
    const token = [...$("tokens").children].indexOf(document.activeElement);
    const targets = { ArrowLeft: token - 1, ArrowUp: token - 1, ArrowRight: token + 1, ArrowDown: token + 1, Home: 0, End: 1e9 };
    if (event.key === "Escape") choose({ token: null });
    else if (event.key in targets) focusToken(targets[event.key]);
    else return;
    event.preventDefault();
  };

  try {
    document.querySelector(".explorer").classList.toggle("two", checkpoints.length > 1);
    checkpoints.forEach((checkpoint) => {
      checkpoint.chart = make("div");
      const map = make("div", { className: "map", tabIndex: 0 },
        ...(checkpoints.length > 1 ? [make("strong", {}, checkpoint.name)] : []), checkpoint.chart);
      map.setAttribute("role", "group");
      map.setAttribute("aria-label", `Depth map of ${checkpoint.name}. Arrow keys choose a read.`);
      map.addEventListener("keydown", onMapKey);
      $("maps").append(map);
    });
    first.tokens.forEach((token, index) => {
      const button = make("button", { type: "button", tabIndex: index ? -1 : 0 }, token);
      button.setAttribute("role", "option");
      button.setAttribute("aria-label", `token ${index}: ${token}`);
      $("tokens").append(button);
    });
    $("tokens").addEventListener("click", (event) => {
      const token = [...$("tokens").children].indexOf(event.target);
      if (token < 0) return;
      focusToken(token);
      choose({ token: token === state.token ? null : token });
    });
    $("tokens").addEventListener("keydown", onTokenKey);
    $("mean").addEventListener("click", () => choose({ token: null }));
    const heads = Math.max(...checkpoints.map((checkpoint) => checkpoint.heads));
    if (heads > 1) {
      $("heads").hidden = false;
      $("head").append(...Array.from({ length: heads }, (_, head) => make("option", { value: head }, String(head))));
      $("head").addEventListener("change", () => choose({ head: Number($("head").value) }));
    }
    showProfile();
    showTokens();
    await drawMaps();
    const redraw = () => {
      showTokens();
      drawMaps().catch(report);
      drawn.forEach((_, element) => drawFigure(element).catch(report));
    };
    dark.addEventListener("change", redraw);
    let width = innerWidth, waiting = 0;
    addEventListener("resize", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => {
        if (innerWidth !== width) redraw();
        width = innerWidth;
      }, 200);
    });
    document.querySelectorAll(".chart").forEach((element) => observer.observe(element));
    addEventListener("beforeprint", () => document.querySelectorAll(".chart").forEach((element) => {
      if (!drawn.has(element)) drawFigure(element).catch(report);
    }));
    document.body.dataset.ready = "true";
  } catch (error) {
    report(error);
  }
})();
