/**
 * Follows Bulkhead's runs in a browser: live, whole after any break, over one connection for all tabs of a site.
 *
 *   import { follow } from "http://127.0.0.1:8888/tasks.js";
 *   const run = follow({ run: id }, { on: { month: event => console.log(event.data) } });
 *   console.log(await run.result);
 *
 * Rule 1: the cursor is the id of the newest event handed out. From wherever events come (a stream, a page, another
 * tab), none is handed out twice, and reading goes on behind the cursor.
 *
 * Rule 2: a tab reads by itself unless it is in step with the tab that leads. Whatever dies or gets lost between
 * tabs only makes the others read by themselves again, each from its own cursor.
 */

/** Milliseconds of every wait, so that tests can shorten them. */
export const times = {
  opens: 10_000, // in which a stream has to bring something, lest a page is asked whether a proxy holds it back
  silence: 45_000, // of a stream, until that is asked again: three of the gateway's heartbeats
  held: 300_000, // until a way that did not work is tried again
  poll: 15_000, // that the gateway may hold a page until there is something on it
  answer: 15_000, // for any answer beyond that
  pause: 1_000, // between polls that bring something; the first one after a failure, which doubles
  longest: 30_000, // of these pauses
  ping: 20_000, // of silence between tabs, until the leader is asked whether it is there
  pong: 5_000, // for its answer
};

const RECENT = 1000; // ids remembered, to know what another tab repeats
const UNREAD = 10_000; // events that wait for a `for await`; one more, and it throws
const FINAL = [400, 401, 403, 404, 405, 406, 410, 414, 421]; // statuses that do not pass by themselves
const STRIKES = 3; // connections in a row that brought nothing, though a page could be had

/** Why there is no result: `status` is the run's ("FAILED", "CANCELLED") or of HTTP, `error` the run's or the problem. */
export class TaskError extends Error {
  constructor(message, status = 0, error = undefined) {
    super(message);
    Object.assign(this, { name: "TaskError", status, error });
  }
}

/**
 * Follow one run, or the named `runs` and all with one of the `tags`, on one connection.
 *
 * @param {string | URL | {base?: string, run?: string, runs?: string[], tags?: string[]}} target the URL of a
 *   run's events, or what to follow; `base` is the gateway's URL, by default where this module came from
 * @param {object} [options]
 * @param {string} [options.after] cursor to begin behind, "latest" or "now"; by default everything
 * @param {string[]} [options.types] names of the events wanted; by default those in `on`, all with `onEvent`
 * @param {Object<string, function(TaskEvent): void>} [options.on] called with each event of a name
 * @param {function(TaskEvent): void} [options.onEvent] called with each event
 * @param {boolean} [options.log] whether output lines are wanted, too
 * @param {string} [options.token] sent as Bearer, which EventSource cannot: then fetch reads the stream
 * @param {string} [options.ticket] for one use, in the first URL
 * @param {boolean} [options.withCredentials] send cookies to another origin; a ticket implies it
 * @param {function(TaskError): Promise<{token?: string, ticket?: string}>} [options.refresh] asked once when refused
 * @param {string | false} [options.share] keeps tabs apart that differ in it; false: a connection of one's own
 * @param {AbortSignal} [options.signal] closes it
 * @returns {Following}
 */
export function follow(target, options = {}) {
  return new Following(target, options);
}

/** @typedef {{id: string, type: string, data: any}} TaskEvent */

export class Following {
  /** Id of the newest event: `after` for whoever continues later. */
  cursor = "";
  /** How events come: "stream", "socket", "poll", or "shared" while another tab reads. */
  via = "";
  /** What the run returned. Rejects with a TaskError, or with an AbortError when it was closed before. */
  result;

  #options;
  #url;
  #names; // of the events wanted; undefined: all
  #from = ""; // "latest" or "now", until a page (of many runs, the first event) has told the cursor
  #life = new AbortController(); // of all of it
  #stop = new AbortController(); // of what is read or waited for now
  #recent = new Set();
  #listeners = new Set();
  #end; // data of stream.end; {} when it has passed unseen
  #failure; // why there will be no end
  #over = false;
  #failures = 0;
  #refreshed = false;
  #opened = false; // the connection works as far as its head
  #heardAt = 0; // its last sign of life
  #retry; // ms that the gateway asked for
  #strikes = {}; // by way of reading
  #shunned = {}; // until when
  #leads = false;
  #leader; // the cursor of who does, when it is known
  #leaderAt = 0; // its last sign of life
  #inStep = false;
  #tell = () => {};

  constructor(target, options) {
    this.#options = { withCredentials: !!options.ticket, ...options }; // a ticket is swapped for a cookie
    this.#url = address(target, options);
    const { after = "", on, onEvent, log, signal } = options;
    const names = options.types ?? (onEvent || !on ? undefined : Object.keys(on));
    this.#names = names && [...names, "stream.reset", "stream.lag", "stream.end", ...(log ? ["log"] : [])];
    if (after === "latest" || after === "now") this.#from = after;
    else this.cursor = after;
    this.result = this.#main();
    this.result.catch(() => {}); // who does not ask for it need not catch it
    signal?.addEventListener("abort", () => this.close());
    if (signal?.aborted) this.close();
  }

  /** Stop following; the run does not notice. */
  close() {
    this.#life.abort();
    this.#stop.abort();
  }

  /** Every event from now on. Throws when the gateway refuses, or when UNREAD events wait. */
  async *[Symbol.asyncIterator]() {
    const unread = [];
    let wake;
    const listener = (event) => {
      if (event && unread.length <= UNREAD) unread.push(event);
      wake?.();
    };
    this.#listeners.add(listener);
    try {
      while (unread.length || !this.#over) {
        if (unread.length > UNREAD) throw new TaskError(`more than ${UNREAD} events are unread; follow from a cursor`);
        if (unread.length) yield unread.shift();
        else await new Promise((resolve) => (wake = resolve));
      }
      if (this.#failure) throw this.#failure;
    } finally {
      this.#listeners.delete(listener);
    }
  }

  // --- the loop --------------------------------------------------------------------------------------------

  async #main() {
    await null; // the caller has what `follow` returns before anything happens
    try {
      this.#share();
      while (!this.#end) await this.#attempt(this.#way());
      return await this.#outcome();
    } catch (error) {
      if (!this.#end && !this.#life.signal.aborted) this.#failure = error;
      throw error;
    } finally {
      this.#over = true;
      for (const listener of this.#listeners) listener();
      this.#leave();
    }
  }

  /** Return the best way of reading that is not known to fail here. */
  #way() {
    const works = (name) => !(this.#shunned[name] > Date.now());
    if (this.#from && this.#isOne) return (signal) => this.#poll(signal, 0);
    if (this.#inStep) return (signal) => this.#listen(signal);
    if (works("stream")) return (signal) => this.#live("stream", signal, this.#native ? this.#source : this.#fetch);
    if (works("socket") && globalThis.WebSocket && !this.#options.log)
      return (signal) => this.#live("socket", signal, this.#socket);
    return (signal) => this.#poll(signal, times.poll);
  }

  /** Read once. Wait after a failure that passes, throw one that does not. */
  async #attempt(read) {
    const { signal } = (this.#stop = new AbortController());
    this.#check();
    try {
      await read(signal);
      this.#failures = 0;
    } catch (error) {
      this.#check();
      if (signal.aborted) return;
      if (!FINAL.includes(error.status)) return await sleep(this.#pause(error), signal);
      if (this.#refreshed || !this.#options.refresh) throw error;
      this.#refreshed = true;
      Object.assign(this.#options, await this.#options.refresh(error));
    }
  }

  #check() {
    if (this.#life.signal.aborted) throw new DOMException("the following was closed", "AbortError");
  }

  #pause({ retryAfter = 0 }) {
    const longest = Math.min(times.longest, times.pause * 2 ** this.#failures++);
    return Math.max(retryAfter, longest * (0.5 + Math.random() / 2));
  }

  /** Return what the run returned: from its last event, else from where results are kept. */
  async #outcome() {
    let end = this.#end;
    const kept = new URL(this.#url.href.replace(/\/events\b.*/, "/result"));
    while (this.#isOne && (!end.status || (end.status === "SUCCESSFUL" && !("result" in end))))
      await this.#attempt(async (signal) => (end = await this.#json(kept, signal)));
    if (!this.#isOne || end.status === "SUCCESSFUL") return end.result;
    throw new TaskError(end.error?.message ?? `the run ended as ${end.status}`, end.status, end.error);
  }

  /** Whether this is one run: it ends with `stream.end`, and there are pages of it. */
  get #isOne() {
    return !this.#url.pathname.endsWith("/api/v1/events");
  }

  /** Whether EventSource will do: it sends no token, hears only names that it was told, and says not what is wrong. */
  get #native() {
    return this.#names && this.#isOne && !this.#options.token && globalThis.EventSource;
  }

  // --- events ----------------------------------------------------------------------------------------------

  /** Hand out the event that follows the cursor. Without a type, it only moves the cursor. */
  #take({ id, type, data }) {
    const control = type?.startsWith("stream.");
    if (this.#end || this.#life.signal.aborted || type === "stream.busy") return;
    if (type ? !control && this.#recent.has(id) : id === this.cursor) return;
    const prev = this.#from ? undefined : this.cursor; // what "now" leaves out, others may want
    this.cursor = id;
    if (!this.#isOne) this.#from = "";
    if (type === "stream.reset") this.#recent.clear(); // ids may come again
    this.#recent.add(id);
    if (this.#recent.size > RECENT) this.#recent.delete(this.#recent.values().next().value);
    if (this.#leads) this.#tell({ prev, id, type, data });
    if (type) this.#hand({ id, type, data });
    if (type === "stream.end" && this.#isOne) this.#finish(data);
    else this.#compare();
  }

  #hand(event) {
    const { on = {}, onEvent } = this.#options;
    for (const call of [Object.hasOwn(on, event.type) && on[event.type], onEvent, ...this.#listeners])
      try {
        if (call) call(event);
      } catch (error) {
        (globalThis.reportError ?? console.error)(error); // the page's own mistake
      }
  }

  #finish(end = {}) {
    this.#end ??= end;
    this.#stop.abort();
  }

  // --- ways of reading -------------------------------------------------------------------------------------

  /** Read a connection to its end. One that brings nothing while a page can be had does not work here. */
  async #live(via, signal, read) {
    this.via = via;
    this.#opened = false;
    this.#heardAt = Date.now();
    const before = this.cursor;
    const connection = linked(signal);
    const watch = this.#watch(connection.signal).finally(() => connection.abort());
    let failure;
    await read.call(this, connection.signal).catch((error) => (failure = error));
    connection.abort();
    const held = await watch;
    if (signal.aborted) return;
    if (FINAL.includes(failure?.status)) throw failure;
    if (!failure && !held) return await sleep(this.#retry ?? times.pause, signal); // its life is over: that is all
    const works = this.cursor !== before || (this.#opened && !held);
    await sleep(Math.random() * times.pause, signal);
    if (signal.aborted) return;
    if (this.#isOne) await this.#poll(signal, 0); // throws what is wrong, unless it is the connection alone
    else if (failure?.status) throw failure;
    if (!works) this.#strike(via, held);
  }

  /** Count a connection that brought nothing; leave a way that keeps doing so. Of many runs there is only one way. */
  #strike(via, held) {
    this.#strikes[via] = held ? STRIKES : (this.#strikes[via] ?? 0) + 1;
    if (this.#strikes[via] < STRIKES || !this.#isOne) throw new TaskError(`the ${via} brings nothing`);
    this.#shunned[via] = Date.now() + times.held;
    this.#strikes[via] = 0;
  }

  /** Tell whether a silent connection is held back or dead, by a page that has more; false once it has ended. */
  async #watch(signal) {
    for (let limit = times.opens; !signal.aborted; limit = times.silence) {
      for (let left; (left = this.#heardAt + limit - Date.now()) > 0 && !signal.aborted; ) await sleep(left, signal);
      if (signal.aborted) break;
      if (!this.#isOne) return true; // fetch hears the heartbeats: silence is nothing that the runs could do
      const page = await this.#page(signal, 0).catch(() => {});
      await sleep(times.pause, signal); // what is on the page may be on its way in the stream, too
      if (signal.aborted) break;
      if (page && (!this.#opened || page.events.some(({ id }) => !this.#recent.has(id)))) return true;
      this.#heardAt = Date.now();
    }
    return false;
  }

  #alive() {
    this.#heardAt = Date.now();
    if (this.#opened) return;
    this.#opened = true;
    this.#failures = this.#strikes[this.via] = 0;
    this.#refreshed = false;
    this.#options.ticket = undefined;
  }

  /** EventSource comes back by itself, until an answer makes it give up; which one, it does not say. */
  #source(signal) {
    return new Promise((resolve, reject) => {
      const source = new EventSource(this.#href(), { withCredentials: this.#options.withCredentials });
      signal.addEventListener("abort", () => resolve(source.close()));
      source.onopen = () => this.#alive();
      source.onerror = () => source.readyState === 2 && reject(new TaskError("EventSource gave up"));
      const hear = ({ type, lastEventId: id, data }) => {
        if (data === undefined || signal.aborted) return; // its own `error` has no data
        this.#alive();
        this.#take({ id, type, data: parse(data) });
      };
      for (const name of new Set(this.#names)) source.addEventListener(name, hear);
    });
  }

  /** The same by fetch, which sends a token and hears every name. The gateway ends lines with LF. */
  async #fetch(signal) {
    const response = await this.#get(this.#href(), "text/event-stream", signal);
    if (response.status === 204) return this.#finish();
    if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) throw new TaskError("this is no stream");
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ; ) {
      const { done, value } = await reader.read();
      if (done || signal.aborted) return;
      this.#alive();
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) if (!signal.aborted) this.#block(block);
    }
  }

  #block(text) {
    const fields = { id: this.cursor, event: "message" };
    for (const line of text.split("\n")) {
      const [, name, value] = /^(\w+): ?(.*)$/s.exec(line) ?? [];
      if (name) fields[name] = name === "data" && "data" in fields ? `${fields.data}\n${value}` : value;
    }
    const { id, event, data, retry } = fields;
    if (retry) this.#retry = Math.min(Number(retry) || 0, 60_000);
    if (data === undefined) this.#take({ id });
    else if (this.#wants(event)) this.#take({ id, type: event, data: parse(data) });
  }

  /** WebSocket, which a proxy that holds streams back may let through. */
  #socket(signal) {
    const { token, ticket } = this.#options;
    const [, base, run] = /^http(.*\/)api\/v1\/runs\/([^/]*)/.exec(this.#url.href);
    const url = new URL(`ws${base}ws`);
    for (const [name, value] of Object.entries({ ticket, token: ticket ? "" : token }))
      if (value) url.searchParams.set(name, value);
    return new Promise((resolve, reject) => {
      const socket = new WebSocket(url);
      signal.addEventListener("abort", () => resolve(socket.close()));
      socket.onopen = () => socket.send(JSON.stringify({ type: "subscribe", run, after: this.cursor || "0" }));
      socket.onclose = ({ code }) => reject(new TaskError(`the WebSocket was closed with ${code}`));
      socket.onmessage = (message) => {
        if (signal.aborted) return;
        const { type, id, event, data, detail } = JSON.parse(message.data);
        if (type === "error") return reject(new TaskError(detail));
        this.#alive();
        if (type === "event" && this.#wants(event)) this.#take({ id, type: event, data });
      };
    });
  }

  #wants(type) {
    return !this.#names || this.#names.includes(type);
  }

  /** Take what a page has, held by the gateway for up to `wait` ms until there is something. */
  async #poll(signal, wait) {
    if (wait) this.via = "poll";
    const before = this.cursor;
    const page = await this.#page(signal, wait);
    if (signal.aborted || this.cursor !== before) return; // another tab was faster
    for (const event of page.events) this.#take(event);
    if (page.next !== "0") this.#take({ id: page.next });
    this.#from = "";
    if (page.ended) this.#finish();
    else if (wait && page.events.length) await sleep(times.pause, signal);
  }

  async #page(signal, wait) {
    const page = await this.#json(this.#href({ limit: 1000, wait: wait / 1000 }), signal, wait);
    return { ...page, events: page.events.filter(({ type }) => this.#wants(type)) };
  }

  async #json(url, signal, wait = 0) {
    const answer = linked(signal, wait + times.answer);
    try {
      return await (await this.#get(url, "application/json", answer.signal)).json();
    } finally {
      answer.abort();
    }
  }

  async #get(url, Accept, signal) {
    const { token, withCredentials } = this.#options;
    const headers = { Accept, ...(token && { Authorization: `Bearer ${token}` }) };
    const credentials = withCredentials ? "include" : "same-origin";
    const response = await fetch(url, { headers, credentials, signal, cache: "no-store" });
    if (response.ok) {
      this.#options.ticket = undefined; // used up; there is a cookie now
      return response;
    }
    const problem = await response.json().catch(() => ({}));
    const told = problem.detail ?? `${url.pathname} answered with status ${response.status}`;
    const retryAfter = 1000 * Math.min(Number(response.headers.get("Retry-After")) || 0, 60);
    throw Object.assign(new TaskError(told, response.status, problem), { retryAfter });
  }

  #href(parameters = {}) {
    const url = new URL(this.#url);
    const { ticket } = this.#options;
    const query = { after: this.cursor || this.#from, ticket, ...parameters };
    for (const [name, value] of Object.entries(query)) if (value) url.searchParams.set(name, value);
    return url;
  }

  // --- tabs ------------------------------------------------------------------------------------------------

  /** Stand in the queue for leading, and listen to whoever leads. */
  #share() {
    const { share } = this.#options;
    const { locks } = globalThis.navigator ?? {};
    // An id of a run is known to those who may see it. Tags are guessed, so whose tabs they are has to be said.
    if (share === false || (share === undefined && this.#url.searchParams.has("tag"))) return;
    if (!locks || !globalThis.BroadcastChannel) return;
    const name = ["bulkhead", this.#url.href, this.#names ?? "", share ?? ""].join(" ");
    const channel = new BroadcastChannel(name);
    const { signal } = this.#life;
    channel.onmessage = ({ data }) => this.#hear(data);
    this.#tell = (message) => channel.postMessage(message);
    this.#leave = () => (this.#life.abort(), channel.close());
    this.#tell({ ask: true });
    const lead = () => {
      this.#leads = true;
      this.#compare();
      this.#announce();
      return new Promise((resolve) => signal.addEventListener("abort", resolve));
    };
    locks.request(name, { signal }, lead).catch(() => {}); // left while in the queue
  }

  #leave = () => {};

  #announce() {
    if (!this.#from) this.#tell({ id: this.cursor });
  }

  #hear({ ask, prev, id, type, data }) {
    if (ask) return this.#leads && this.#announce();
    if (this.#end || this.#leads) return;
    this.#leaderAt = Date.now();
    if (prev === this.cursor && !this.#from) this.#take({ id, type, data });
    this.#leader = id;
    this.#compare();
  }

  /** Stop reading when in step with the leader, begin again when not. */
  #compare() {
    const near = this.#leader === this.cursor || this.#recent.has(this.#leader);
    const inStep = !this.#leads && !this.#from && this.#leader !== undefined && near;
    if (inStep !== this.#inStep) this.#stop.abort();
    this.#inStep = inStep;
  }

  /** Wait while another tab reads; one that does not answer reads no more. */
  async #listen(signal) {
    this.via = "shared";
    await sleep(times.ping, signal);
    const asked = Date.now();
    if (signal.aborted || asked - this.#leaderAt < times.ping) return;
    this.#tell({ ask: true });
    await sleep(times.pong, signal);
    if (this.#leaderAt < asked) this.#leader = undefined;
    this.#compare();
  }
}

/** The URL of the events to follow. */
function address(target, { log, types }) {
  if (typeof target === "string" || target instanceof URL) target = { url: new URL(target, globalThis.location?.href) };
  const { base = new URL(".", import.meta.url), run, runs = [], tags = [] } = target;
  const path = run ? `api/v1/runs/${encodeURIComponent(run)}/events` : "api/v1/events";
  const url = target.url ?? new URL(path, `${base}`.replace(/\/?$/, "/"));
  for (const id of runs) url.searchParams.append("run", id);
  for (const tag of tags) url.searchParams.append("tag", tag);
  if (runs.length && !tags.length) url.searchParams.set("until", "done");
  if (types?.length) url.searchParams.set("types", [...types, ...(log ? ["log"] : [])].join());
  if (log) url.searchParams.set("include", "log");
  return url;
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

/** A controller that follows `signal`, and aborts after `ms` when they are given. */
function linked(signal, ms) {
  const controller = new AbortController();
  const abort = () => controller.abort();
  const timer = ms && setTimeout(abort, ms);
  controller.signal.addEventListener("abort", () => {
    clearTimeout(timer);
    signal.removeEventListener("abort", abort);
  });
  signal.addEventListener("abort", abort);
  if (signal.aborted) abort();
  return controller;
}

function sleep(ms, signal) {
  return new Promise((resolve) => {
    const nap = linked(signal, Math.max(1, ms));
    if (nap.signal.aborted) resolve();
    nap.signal.addEventListener("abort", () => resolve());
  });
}
