"use strict";
// What the page does: filters, charts, tables. All figures are in the element #facts; nothing is loaded.
// Text of records goes into the page as textContent only, never as markup.
(() => {
  const island = JSON.parse(document.getElementById("facts").textContent);
  const MISSING = "-";
  const MORE_ROWS = 500;

  // An element with properties and children; children that are texts stay texts.
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
  const decoded = ({ texts, at }) => at.map((place) => texts[place]);

  // {words: {column: coded}, numbers: {column: values}} as an object for each row.
  const rowsOf = ({ words, numbers }) => {
    const columns = [
      ...Object.entries(words).map(([name, column]) => [name, decoded(column)]),
      ...Object.entries(numbers),
    ];
    const length = columns.length ? columns[0][1].length : 0;
    return Array.from({ length }, (_, row) => Object.fromEntries(columns.map(([name, values]) => [name, values[row]])));
  };
  const tables = Object.fromEntries(Object.entries(island.facts).map(([name, table]) => [name, rowsOf(table)]));

  // The mark of a backend as charts have it.
  const symbolOf = ({ colour, character }) => {
    const symbol = make("span", { className: "symbol", style: `color: ${colour}` }, character);
    symbol.setAttribute("aria-hidden", "true");
    return symbol;
  };

  // Of each condition the values that were chosen; none stands for all.
  const chosen = new Map(island.filters.map(({ name }) => [name, new Set()]));
  // A filter says nothing of facts that do not have its condition.
  const passes = (fact) =>
    [...chosen].every(([name, values]) => !values.size || !(name in fact) || values.has(fact[name]));

  const buildFilters = () => {
    const form = document.getElementById("filters");
    // A page of kernels alone has no cases to filter.
    if (!form) return;
    for (const { name, label, values } of island.filters) {
      const chips = values.map((value) => {
        const box = make("input", { type: "checkbox", name, value });
        box.addEventListener("change", () => {
          if (box.checked) chosen.get(name).add(value);
          else chosen.get(name).delete(value);
          update();
        });
        const mark = island.legend[name]?.find((series) => series.name === value);
        const symbol = mark ? [symbolOf(mark)] : [];
        return make("label", { className: "chip" }, box, ...symbol, make("span", {}, value));
      });
      form.append(make("fieldset", {}, make("legend", {}, label), ...chips));
    }
    const clear = make("button", { type: "reset", className: "quiet" }, "Clear");
    form.append(make("p", { className: "counted" }, make("output", { id: "kept" }), clear));
    form.addEventListener("reset", () => {
      for (const values of chosen.values()) values.clear();
      update();
    });
  };

  const tellKept = () => {
    const kept = tables.cases.filter(passes).length;
    const output = document.getElementById("kept");
    if (!output) return;
    output.textContent =
      kept === tables.cases.length
        ? `All ${plural(kept, "case")}`
        : `${kept.toLocaleString("en")} of ${plural(tables.cases.length, "case")}`;
  };

  const EMBED = {
    mode: "vega",
    ast: true, // Expressions are interpreted, so that the page needs no right to evaluate code.
    actions: false,
    renderer: "svg",
    tooltip: { theme: "page", disableDefaultStyle: true },
    logLevel: 1, // Errors: that a layer has nothing to draw, as where no floor is known, is none.
  };
  const withData = (spec, facts, changes) => ({
    ...spec,
    data: spec.data.map((source) => (source.name === "facts" ? { ...source, values: facts } : source)),
    ...changes,
  });

  class ChartView {
    constructor(chart) {
      this.chart = chart;
      this.figure = document.getElementById(chart.name);
      this.choices = this.figure.querySelector(".choices");
      this.legend = this.figure.querySelector(".legend");
      this.grid = this.figure.querySelector(".panels");
      this.picked = {};
      this.panels = [];
      this.grid.replaceChildren();
    }

    // The facts that the filters leave, a group for each set of conditions in which something can be compared.
    groups() {
      const { table, values, facets, across, least } = this.chart;
      const found = new Map();
      for (const fact of tables[table]) {
        if (!passes(fact) || values.some((name) => fact[name] == null)) continue;
        const key = JSON.stringify(facets.map((name) => fact[name]));
        if (!found.has(key)) found.set(key, { key: facets.map((name) => fact[name]), facts: [] });
        found.get(key).facts.push(fact);
      }
      const groups = [...found.values()].filter(
        ({ facts }) => new Set(facts.map((fact) => fact[across])).size >= least,
      );
      return groups.sort((one, other) => compareLists(one.key, other.key));
    }

    // Conditions become a choice, the first ones first, until few enough panels are left.
    shown(groups) {
      const { facets, limits, labels } = this.chart;
      const fullest = groups.reduce((best, group) => (group.facts.length > best.facts.length ? group : best), groups[0]);
      const parts = [];
      let left = groups;
      facets.forEach((name, place) => {
        // What all panels have alone is told: elsewhere on the page there are others.
        const all = new Set(groups.map(({ key }) => key[place]));
        const [only] = all;
        if (all.size === 1 && only) parts.push(make("span", {}, only.includes(labels[place]) ? only : `${labels[place]} ${only}`));
        const values = [...new Set(left.map(({ key }) => key[place]))];
        if (left.length <= limits[place] || values.length < 2) return;
        const wishes = [this.picked[name], island.first[name], fullest.key[place], values[0]];
        const picked = wishes.find((value) => values.includes(value));
        const select = make("select", { name }, ...values.map((text) => new Option(text, text, false, text === picked)));
        select.addEventListener("change", () => {
          this.picked[name] = select.value;
          this.draw().then(() => this.choices.querySelector(`[name="${name}"]`)?.focus());
        });
        parts.push(make("label", {}, `${labels[place]} `, select));
        left = left.filter(({ key }) => key[place] === picked);
      });
      this.choices.replaceChildren(...parts);
      return left;
    }

    // The marks of the backends, or networks, that are shown; bars have theirs beside them.
    tellMarks(shown) {
      const { spec, across, series } = this.chart;
      const named = new Set(shown.flatMap(({ facts }) => facts.map((fact) => fact[series])));
      const marks = spec.legends && across !== series ? island.legend[series].filter(({ name }) => named.has(name)) : [];
      this.legend.replaceChildren(...marks.map((one) => make("li", {}, symbolOf(one), ` ${one.name}`)));
    }

    async draw() {
      const groups = this.groups();
      const shown = groups.length ? this.shown(groups) : [];
      if (!groups.length) this.choices.replaceChildren("Nothing to draw of these cases: ", this.chart.needs, ".");
      this.tellMarks(shown);
      const varying = this.chart.facets.map((_, place) => new Set(shown.map(({ key }) => key[place])).size > 1);
      while (this.panels.length > shown.length) this.panels.pop().remove();
      this.grid.classList.toggle("single", shown.length === 1);
      for (const [place, { key, facts }] of shown.entries()) {
        const heading = key.filter((value, part) => varying[part] && value).join(", ");
        const whole = key.filter(Boolean).join(", ");
        if (!this.panels[place]) {
          this.panels[place] = new PanelView(this.chart);
          this.grid.append(this.panels[place].element);
        }
        await this.panels[place].show(heading, whole, facts);
      }
    }
  }

  class PanelView {
    constructor(chart) {
      this.chart = chart;
      this.heading = make("h4");
      this.canvas = make("div", { className: "canvas" });
      const buttons = ["SVG", "PNG"].map((kind) => {
        const button = make("button", { type: "button", className: "quiet" }, kind);
        button.addEventListener("click", () => this.download(kind.toLowerCase()));
        return button;
      });
      this.note = make("span", { className: "note" });
      this.element = make("div", { className: "panel" }, this.heading, this.canvas);
      const files = make("span", { className: "downloads" }, "Download: ", ...buttons);
      this.element.append(make("p", { className: "files" }, this.note, files));
    }

    // heading: what sets the panel apart from those beside it; whole: from all that is on the page.
    async show(heading, whole, facts) {
      Object.assign(this, { facts, whole });
      this.heading.textContent = heading;
      this.heading.hidden = !heading;
      this.note.textContent = [...new Set(facts.map((fact) => fact[this.chart.note]))].filter(Boolean).join("; ");
      const width = this.canvas.clientWidth;
      if (this.view) {
        await this.view.data("facts", facts).width(width).runAsync();
      } else {
        const spec = withData(this.chart.spec, facts, { width, legends: [] });
        this.view = (await vegaEmbed(this.canvas, spec, EMBED)).view;
        new ResizeObserver(() => this.fit()).observe(this.canvas);
        // Vega gives the element a role and a name of its own.
        this.canvas.setAttribute("role", "img");
      }
      this.canvas.setAttribute("aria-label", [this.chart.title, whole, this.chart.summary].filter(Boolean).join(". "));
    }

    fit() {
      const width = this.canvas.clientWidth;
      if (width && width !== this.view.width()) this.view.width(width).runAsync();
    }

    remove() {
      this.view?.finalize();
      this.element.remove();
    }

    // A picture by itself: on white, with its title, its conditions and its legend.
    async picture() {
      const subtitle = [this.note.textContent, this.whole, this.chart.shared].flatMap(linesOf);
      const title = { text: this.chart.title, subtitle, anchor: "start", offset: 12 };
      const changes = { width: 720, background: "white", title, padding: 16, autosize: "pad" };
      const spec = JSON.parse(JSON.stringify(this.chart.spec).replaceAll("currentColor", "#1a1a1a"));
      return (await vegaEmbed(make("div"), withData(spec, this.facts, changes), EMBED)).view;
    }

    async download(kind) {
      const view = await this.picture();
      const href = await view.toImageURL(kind, kind === "png" ? 2 : 1);
      const name = [this.chart.name, this.whole].filter(Boolean).join("-");
      make("a", { href, download: `${safeName(name)}.${kind}` }).click();
      view.finalize();
    }
  }

  // A text in lines that a picture has room for.
  const linesOf = (text) => text.match(/\S(?:.{0,98}\S)?(?=\s|$)|\S{1,100}/g) ?? [];
  const safeName = (text) => text.replace(/[^\w.-]+/g, "-").replace(/^[.-]+|-+$/g, "").slice(0, 80) || "chart";

  const collator = new Intl.Collator("en", { numeric: true });
  const UNITS = { k: 1e3, M: 1e6, B: 1e9 };
  // The number that a text begins with: "38.8M", "0.95x", "601.4..610.7", "2 steps".
  const leading = (text) => {
    const found = /^([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)([kMB](?![a-z]))?/.exec(text);
    return found ? Number(found[1]) * (UNITS[found[2]] ?? 1) : NaN;
  };
  const compare = (one, other) => {
    const difference = leading(one) - leading(other);
    return difference || collator.compare(one, other);
  };
  const compareLists = (one, other) => {
    const place = one.findIndex((text, part) => text !== other[part]);
    return place < 0 ? 0 : compare(one[place], other[place]);
  };

  class TableView {
    constructor(section) {
      const rest = island.tables[section.dataset.table];
      this.table = section.querySelector("table");
      this.body = this.table.tBodies[0];
      this.headings = [...this.table.tHead.rows[0].cells];
      this.limit = this.body.rows.length;
      this.rows = [...this.body.rows].map((row) => [...row.cells].map((cell) => cell.textContent));
      const columns = rest.columns.map(decoded);
      for (let row = 0; columns.length && row < columns[0].length; row++) {
        this.rows.push(columns.map((column) => column[row]));
      }
      this.cases = rest.cases;
      this.order = this.rows.map((_, row) => row);
      this.sorted = null;
      this.headings.forEach((heading, column) => {
        const button = make("button", { type: "button" }, heading.textContent);
        button.addEventListener("click", () => this.sort(column));
        heading.replaceChildren(button);
      });
      this.told = make("output");
      this.more = make("button", { type: "button", className: "quiet" }, "Show more");
      this.more.addEventListener("click", () => {
        this.limit += MORE_ROWS;
        this.draw();
      });
      section.append(make("p", { className: "counted" }, this.told, this.more));
      this.draw();
    }

    // The first click sorts from the least, the next from the most; missing values are last in both.
    sort(column) {
      const descending = this.sorted?.column === column && !this.sorted.descending;
      this.sorted = { column, descending };
      const sign = descending ? -1 : 1;
      this.order.sort((one, other) => {
        const [a, b] = [this.rows[one][column], this.rows[other][column]];
        if (a === MISSING || b === MISSING) return (a === MISSING) - (b === MISSING) || one - other;
        return sign * compare(a, b) || one - other;
      });
      this.headings.forEach((heading, place) => {
        if (place === column) heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
        else heading.removeAttribute("aria-sort");
      });
      this.draw();
    }

    draw() {
      const isKept = (row) => !this.cases.length || this.cases[row].some((place) => passes(tables.cases[place]));
      const kept = this.order.filter(isKept);
      const rows = kept.slice(0, this.limit).map((row) => {
        const cells = this.rows[row].map((text, column) => {
          const cell = make(column ? "td" : "th", { className: this.headings[column].className }, text);
          if (!column) cell.scope = "row";
          return cell;
        });
        return make("tr", {}, ...cells);
      });
      this.body.replaceChildren(...rows);
      const all = plural(kept.length, "row");
      this.told.textContent = rows.length < kept.length ? `${rows.length.toLocaleString("en")} of ${all}` : all;
      this.more.hidden = rows.length === kept.length;
    }
  }

  const charts = island.charts.map((chart) => new ChartView(chart));
  const views = [];
  document.querySelectorAll("[data-table]").forEach((section) => {
    const folded = section.closest("details");
    const build = () => views.push(new TableView(section));
    if (!folded || folded.open) build();
    else folded.addEventListener("toggle", build, { once: true });
  });
  let generation = 0;

  // Tables at once; charts one after the other, those in sight first, so that the page answers in between.
  const update = async () => {
    const mine = ++generation;
    tellKept();
    views.filter((view) => view.cases.length).forEach((view) => view.draw());
    const distance = ({ figure }) => Math.abs(figure.getBoundingClientRect().top);
    for (const chart of [...charts].sort((one, other) => distance(one) - distance(other))) {
      await new Promise((done) => setTimeout(done));
      if (mine !== generation) return;
      await chart.draw();
    }
    document.documentElement.dataset.drawn = "yes";
  };

  document.querySelectorAll("[data-all-columns]").forEach((box) => {
    const table = document.querySelector(`[data-table="${box.dataset.allColumns}"] table`);
    box.addEventListener("change", () => table.classList.toggle("all", box.checked));
  });
  // Paper shows what is folded away on a screen.
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
  document.documentElement.classList.add("scripted");
  buildFilters();
  update();
})();
