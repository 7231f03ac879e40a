/**
 * Brings `{% stream run %}` to life: shows a run's state, progress and last events as they come.
 *
 * What it follows with is the gateway's own `tasks.js`. Whatever a run says becomes text, never markup. The element
 * tells the page: `bulkhead:event` for each event, `bulkhead:end` for the last, with it as `detail`; both bubble.
 */

const BEFORE = 100; // events in front of the newest that a page begins with
const KEPT = 500; // lines on the page
const LONG = 300; // characters of a line
const RESULT = 2_000; // characters of a result
const PAUSES = [500, 30_000]; // ms between tries, doubled from the first to the longest
const ENDED = ["SUCCESSFUL", "FAILED", "CANCELLED"];

class Stream extends HTMLElement {
  #life;
  #following;
  #unpainted = [];
  #painting = false;
  #changes = {}; // what the next frame shows
  #known = false; // how far the run is

  connectedCallback() {
    const life = (this.#life = new AbortController());
    if (this.dataset.ticket)
      this.#main(life.signal).catch((error) => {
        if (life.signal.aborted) return;
        console.error(error);
        this.#say("refused");
      });
  }

  disconnectedCallback() {
    this.#life.abort();
    this.#following?.close();
  }

  async #main(signal) {
    const snapshot = await this.#snapshot(signal);
    if (!snapshot) return; // the gateway has forgotten it: what the site knew stays
    const tasks = await this.#module(signal);
    signal.throwIfAborted();
    this.querySelector('[data-part="lines"]')?.replaceChildren(); // of before it was moved
    this.#status(snapshot.status);
    if (snapshot.progress) this.#progress(snapshot.progress);
    const [, epoch, last] = /^(e\d+-)?(\d+)$/.exec(snapshot.offsets.cursor);
    const after = Math.max(0, snapshot.offsets.first - 1, last - BEFORE);
    this.#following = tasks.follow(this.dataset.url, {
      after: after ? `${epoch ?? ""}${after}` : "",
      log: "log" in this.dataset,
      withCredentials: true, // the snapshot's ticket has become a cookie
      signal,
      onEvent: (event) => this.#take(event),
      refresh: () => this.#another(),
    });
    try {
      this.#end("SUCCESSFUL", await this.#following.result);
    } catch (error) {
      if (!ENDED.includes(error.status)) throw error;
      this.#end(error.status, undefined, error.error ?? { message: error.message });
    }
  }

  // --- the gateway -----------------------------------------------------------------------------------------

  /** Return the run as it stands, as soon as there is a gateway that knows it: it may still be in the outbox. */
  async #snapshot(signal) {
    const url = new URL(this.dataset.url.replace(/\/events$/, ""));
    const paths = new URL(`${this.dataset.gateway}/tasks.js`);
    for (let tries = 0, renewed = false; ; tries++) {
      const asked = new URL(url);
      if (this.dataset.ticket) asked.searchParams.set("ticket", this.dataset.ticket);
      const answer = await fetch(asked, { credentials: "include", cache: "no-store", signal }).catch(() => {});
      signal.throwIfAborted();
      if (answer?.ok) return await answer.json();
      if (answer?.status === 404 && ENDED.includes(this.dataset.status)) return undefined;
      if (answer && [400, 401, 403, 405, 421].includes(answer.status)) {
        if (answer.status !== 401 || renewed) throw new Error((await answer.json().catch(() => ({}))).detail);
        renewed = true;
        this.dataset.ticket = (await this.#another()).ticket;
        continue;
      }
      // Everybody may read the module: if that can be had and the run cannot, it is this origin that is not let in.
      if (!answer) this.#say((await fetch(paths, { signal }).catch(() => {})) ? "shut" : "away");
      await pause(tries, signal);
    }
  }

  /** Import the gateway's module. A browser keeps a failure by URL; the fragment makes another one of it. */
  async #module(signal) {
    for (let tries = 0; ; tries++) {
      try {
        return await import(`${this.dataset.gateway}/tasks.js${tries ? `#${tries}` : ""}`);
      } catch (error) {
        signal.throwIfAborted();
        this.#say("away");
        await pause(tries, signal);
      }
    }
  }

  /** Return another ticket: the one that this very page has when it is loaded anew. */
  async #another() {
    const answer = await fetch(location.href, { cache: "reload", credentials: "same-origin" });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const ticket = page.querySelector(`bulkhead-stream[data-run="${this.dataset.run}"]`)?.dataset.ticket;
    if (!ticket) throw new Error("the page has no other ticket for this run");
    return { ticket };
  }

  // --- what comes ------------------------------------------------------------------------------------------

  #take(event) {
    const { type, data } = event;
    this.dispatchEvent(new CustomEvent("bulkhead:event", { detail: event, bubbles: true }));
    if (type === "run.started") this.#status("RUNNING");
    else if (type === "run.retrying") this.#status("READY");
    if (type === "run.progress" || type === "progress") this.#progress(data);
    if (type === "run.progress" || type.startsWith("stream.")) return;
    this.#unpainted.push(type === "log" ? ["", data.text] : [type, JSON.stringify(own(data))]);
    if (this.#unpainted.length > KEPT) this.#unpainted.shift();
    this.#later({});
  }

  /** `run.progress` tells it by contract; `progress` by custom, as `step` of `total`. */
  #progress(data) {
    const done = data?.done ?? data?.step;
    if (typeof done !== "number") return;
    const total = data.total ?? data.total_steps;
    this.#later({ done, total: typeof total === "number" ? total : undefined, message: data.message ?? "" });
  }

  #status(status) {
    this.#later({ status });
  }

  #end(status, result, error) {
    const message = error?.message ?? error?.code ?? "";
    this.#later({ status, result, error: status === "FAILED" ? message || status : message });
    this.dispatchEvent(new CustomEvent("bulkhead:end", { detail: { status, result, error }, bubbles: true }));
  }

  // --- the page --------------------------------------------------------------------------------------------

  /** Change the page at its next frame, however much comes until then. */
  #later(changes) {
    Object.assign(this.#changes, changes);
    if (this.#painting) return;
    this.#painting = true;
    // A tab in the background has no frames.
    const paint = () => this.#painting && ((this.#painting = false), this.#paint());
    requestAnimationFrame(paint);
    setTimeout(paint, 250);
  }

  #paint() {
    const { status, done, total, message, result, error } = this.#changes;
    this.#changes = {};
    this.#lines(this.#unpainted.splice(0));
    const bar = this.querySelector("progress");
    if (done !== undefined && bar) {
      this.#known = true;
      bar.max = total > 0 ? total : 1;
      if (total > 0) bar.value = Math.min(done, total);
      else bar.removeAttribute("value");
      this.#part("message", [total > 0 ? `${done} / ${total}` : `${done}`, message].filter(Boolean).join(" · "));
    }
    if (status) {
      this.dataset.status = status;
      this.#say(status);
      if (bar && status === "RUNNING" && !this.#known) bar.removeAttribute("value"); // moves, nobody knows how far
      if (bar && status === "SUCCESSFUL") bar.value = bar.max;
      else if (bar && ENDED.includes(status) && bar.position < 0) bar.value = 0; // it no longer moves
    }
    if (result !== undefined && result !== null)
      this.#part("result", short(typeof result === "string" ? result : JSON.stringify(result, null, 1), RESULT));
    if (error) this.#part("error", error);
  }

  #lines(lines) {
    const list = this.querySelector('[data-part="lines"]');
    if (!list || !lines.length) return;
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 8;
    for (const [name, text] of lines) {
      const line = document.createElement("div");
      if (name) line.appendChild(document.createElement("b")).textContent = name;
      line.append(short(text ?? "", LONG));
      list.append(line);
    }
    while (list.childElementCount > KEPT) list.firstElementChild.remove();
    if (atEnd) list.scrollTop = list.scrollHeight; // whoever has scrolled back reads
  }

  #part(name, text) {
    const part = this.querySelector(`[data-part="${name}"]`);
    if (part) Object.assign(part, { textContent: text, hidden: false });
  }

  #say(what) {
    for (const word of this.querySelectorAll("[data-when]")) word.hidden = word.dataset.when !== what;
  }
}

/** The task's own part of an object: what begins with `_` is the gateway's. */
function own(data) {
  if (!data || typeof data !== "object" || Array.isArray(data)) return data;
  return Object.fromEntries(Object.entries(data).filter(([name]) => !name.startsWith("_")));
}

function short(text, length) {
  return text.length > length ? `${text.slice(0, length)}…` : text;
}

function pause(tries, signal) {
  const [first, longest] = PAUSES;
  const ms = Math.min(longest, first * 2 ** tries) * (0.5 + Math.random() / 2);
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}

customElements.get("bulkhead-stream") ?? customElements.define("bulkhead-stream", Stream);
