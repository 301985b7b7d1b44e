"use strict";
(() => {
  const json = (element) => (element ? JSON.parse(element.textContent) : {});
  const images = json(document.getElementById("images"));
  const dark = json(document.getElementById("shades"));
  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // Images and, where there is none, a letter in their place

  const fill = (place) => {
    const source = images[place.dataset.image];
    if (source) {
      const image = make("img");
      image.src = source;
      image.alt = "Image of " + place.dataset.title;
      place.append(image);
    } else {
      place.textContent = (place.dataset.title.match(/[\p{L}\p{N}]/u) || ["·"])[0].toUpperCase();
      place.setAttribute("aria-hidden", "true");
    }
    return place;
  };
  document.querySelectorAll(".thumb").forEach(fill);

  // Sounds and clips, which start when the reader says so; an animated image plays by itself

  const players = json(document.getElementById("players"));
  const play = (place) => (players[place.dataset.item] || []).forEach(({ element, source, modality }) => {
    const label = modality + " of " + place.dataset.title;
    const player = make(element, "player", element === "a" ? modality : undefined);
    if (element === "a") {
      player.href = source;
      player.rel = "noreferrer";
    } else {
      player.src = source;
    }
    if (element === "img") player.alt = label; else player.setAttribute("aria-label", label);
    if (element === "audio" || element === "video") Object.assign(player, { controls: true, preload: "metadata", loop: element === "video" });
    place.append(player);
  });
  document.querySelectorAll(".players").forEach(play);

  // Theme: the system's until the reader chooses; figures change with it

  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const remembered = () => { try { return localStorage.getItem("qbert-theme"); } catch { return null; } };
  const figures = [...document.querySelectorAll(".plot")].map((place) => [place, json(place.nextElementSibling)]);

  const shade = (value, isDark) => {
    if (typeof value === "string") return (isDark && dark[value.toLowerCase()]) || value;
    if (Array.isArray(value)) return value.map((one) => shade(one, isDark));
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, shade(one, isDark)]));
    return value;
  };
  const template = (isDark) => {
    const ink = isDark ? "#e8edf3" : "#16202c", line = isDark ? "#2d3744" : "#e3e7ec", axisLine = isDark ? "#4a5666" : "#b4bcc6";
    const axis = { gridcolor: line, zerolinecolor: axisLine, linecolor: axisLine, tickcolor: axisLine, tickfont: { size: 12 }, title: { font: { size: 13 } } };
    return { layout: {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis,
      font: { color: ink, size: 13, family: getComputedStyle(document.body).fontFamily }, legend: { font: { size: 12.5 } },
      hoverlabel: { bgcolor: isDark ? "#232c38" : "#ffffff", bordercolor: axisLine, font: { color: ink, size: 13 } },
      annotationdefaults: { font: { color: ink, size: 12 }, arrowcolor: axisLine, bgcolor: isDark ? "#10151b" : "#ffffff" },
    } };
  };
  const draw = (isDark) => Promise.all(figures.map(([place, figure]) =>
    Plotly.react(place, shade(figure.data, isDark), { ...shade(figure.layout, isDark), template: template(isDark) },
      { responsive: true, displayModeBar: false, showTips: false })));
  const setTheme = (name) => {
    document.documentElement.dataset.theme = name;
    button.setAttribute("aria-pressed", String(name === "dark"));
    document.body.dataset.drawn = "";
    return draw(name === "dark").then(() => { document.body.dataset.drawn = name; });
  };
  button.addEventListener("click", () => {
    const name = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("qbert-theme", name); } catch { /* a browser may forbid it: the choice holds while the page is open */ }
    setTheme(name);
  });
  system.addEventListener("change", () => { if (!remembered()) setTheme(system.matches ? "dark" : "light"); });
  setTheme(remembered() || (system.matches ? "dark" : "light"));

  // The tree of prefixes: nodes are made when their parent is opened

  const LETTERS = "abcdefghijklmnopqrstuvwxyz", SHOWN = 60;
  const browse = (place, data) => {
    const root = place.querySelector("[role=tree]"), gallery = place.querySelector(".gallery"), shown = place.querySelector(".shown");
    const token = (codes) => codes.map((code, level) => `<${LETTERS[level]}_${code}>`).join("");

    const show = (items, title) => {
      const some = items.slice(0, SHOWN);
      shown.textContent = `${title}: ${items.length.toLocaleString("en")} item${items.length === 1 ? "" : "s"}` + (items.length > some.length ? `, the first ${SHOWN}` : "");
      gallery.replaceChildren(...some.map((item) => {
        const card = make("div", "item"), words = make("span", "words"), thumb = make("span", "thumb");
        thumb.dataset.image = `${data.domain}/${data.rows[item]}`;
        thumb.dataset.title = data.titles[item];
        words.append(make("span", "title", data.titles[item]), make("code", "sid", token(data.codes[item])), make("span", "why", data.ids[item]));
        card.append(fill(thumb), words);
        return card;
      }));
    };

    const children = (items, prefix) => {
      const level = prefix.length, groups = new Map();
      for (const item of items) {
        const code = data.codes[item][level];
        if (!groups.has(code)) groups.set(code, []);
        groups.get(code).push(item);
      }
      const order = [...groups.entries()].sort((a, b) => b[1].length - a[1].length || a[0] - b[0]);
      return order.map(([code, members]) => node([...prefix, code], members));
    };

    const node = (prefix, items) => {
      const element = make("li"), row = make("div", "node"), leaf = prefix.length === data.codes[items[0]].length;
      element.setAttribute("role", "treeitem");
      element.setAttribute("aria-level", prefix.length);
      element.setAttribute("aria-selected", "false");
      element.tabIndex = -1;
      if (!leaf) element.setAttribute("aria-expanded", "false");
      const hint = items.length === 1 ? data.titles[items[0]] : prefix.length === 1 ? (data.hints[prefix[0]] || []).join(", ") : "";
      row.append(make("span", "twist", leaf ? "" : "▸"), make("code", "", `<${LETTERS[prefix.length - 1]}_${prefix[prefix.length - 1]}>`),
        make("span", "hint", hint), make("span", "count", leaf ? "" : items.length.toLocaleString("en")));
      row.firstChild.setAttribute("aria-hidden", "true");
      element.setAttribute("aria-label", `${token(prefix)}, ${items.length} item${items.length === 1 ? "" : "s"}${hint ? ", " + hint : ""}`);
      element.append(row);
      element.qbert = { prefix, items, leaf };
      return element;
    };

    const open = (element, wanted) => {
      if (element.qbert.leaf) return;
      let group = element.querySelector(":scope > ul");
      if (wanted && !group) {
        group = make("ul");
        group.setAttribute("role", "group");
        group.append(...children(element.qbert.items, element.qbert.prefix));
        element.append(group);
      }
      element.setAttribute("aria-expanded", String(wanted));
      element.querySelector(".twist").textContent = wanted ? "▾" : "▸";
      if (group) group.hidden = !wanted;
    };
    const isOpen = (element) => element.getAttribute("aria-expanded") === "true";

    const choose = (element, focus) => {
      root.querySelectorAll("[aria-selected=true]").forEach((one) => one.setAttribute("aria-selected", "false"));
      root.querySelectorAll("[tabindex='0']").forEach((one) => { one.tabIndex = -1; });
      element.setAttribute("aria-selected", "true");
      element.tabIndex = 0;
      if (focus) { element.focus({ preventScroll: true }); element.firstChild.scrollIntoView({ block: "nearest" }); }
      show(element.qbert.items, token(element.qbert.prefix));
    };

    const visible = () => [...root.querySelectorAll("[role=treeitem]")].filter((one) => !one.parentElement.closest("ul[hidden]"));
    root.addEventListener("click", (event) => {
      const element = event.target.closest("[role=treeitem]");
      if (!element) return;
      open(element, !isOpen(element));
      choose(element, true);
    });
    root.addEventListener("keydown", (event) => {
      const element = event.target.closest("[role=treeitem]");
      if (!element || event.altKey || event.ctrlKey || event.metaKey) return;
      const all = visible(), at = all.indexOf(element), parent = element.parentElement.closest("[role=treeitem]");
      const moves = {
        ArrowDown: () => all[at + 1], ArrowUp: () => all[at - 1], Home: () => all[0], End: () => all[all.length - 1],
        ArrowRight: () => { if (element.qbert.leaf) return null; if (isOpen(element)) return all[at + 1]; open(element, true); return element; },
        ArrowLeft: () => { if (isOpen(element)) { open(element, false); return element; } return parent; },
        Enter: () => { open(element, !isOpen(element)); return element; }, " ": () => { open(element, !isOpen(element)); return element; },
      };
      if (!moves[event.key]) return;
      event.preventDefault();
      const next = moves[event.key]();
      if (next) choose(next, true);
    });

    place.querySelector(".find").addEventListener("input", (event) => {
      const asked = event.target.value.trim().toLowerCase();
      if (!asked) return;
      const found = data.titles.map((_, item) => item).filter((item) =>
        data.titles[item].toLowerCase().includes(asked) || data.ids[item].toLowerCase() === asked || (asked[0] === "<" && token(data.codes[item]).startsWith(asked)));
      show(found, `found for “${asked}”`);
    });

    root.append(...children(data.rows.map((_, item) => item), []));
    if (root.firstChild) { choose(root.firstChild, false); }
  };
  const trees = Object.fromEntries([...document.querySelectorAll(".tree-data")].map(json).map((data) => [data.domain, data]));
  document.querySelectorAll(".browser").forEach((place) => browse(place, trees[place.dataset.tree]));
})();
