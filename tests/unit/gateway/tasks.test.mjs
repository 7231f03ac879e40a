// tasks.js against a gateway, locks and channels in memory. Run by test_tasks_js.py: `node --test`.

import assert from "node:assert/strict";
import { copyFileSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, test } from "node:test";

// Node takes a `.js` for CommonJS, unless a package.json says otherwise: it is imported from a copy.
const folder = mkdtempSync(join(tmpdir(), "tasks-js-"));
const copy = join(folder, "tasks.mjs");
copyFileSync(new URL("../../../gateway/tasks.js", import.meta.url), copy);
const { follow, times, TaskError } = await import(copy);
rmSync(folder, { recursive: true });

const BASE = "http://gateway.test/";
const END = ["stream.end", { status: "SUCCESSFUL", result: 42 }];

Object.assign(times, { opens: 60, silence: 120, held: 150, poll: 40, answer: 500, pause: 5, longest: 20, ping: 60, pong: 40 });

/** Runs in memory, served by all the ways that the real one serves them. */
class Gateway {
  events = []; // [id, type, data]
  wakes = new Set();
  requests = [];
  open = new Set(); // streams, as `subscribers` counts them
  refuse = () => undefined; // (url, accept, headers) => status
  swallows = false; // event streams, as a proxy that buffers does
  sources = 0;
  holds = {}; // by cursor, what an answer waits for
  result = { status: "SUCCESSFUL", result: 42 };

  say(type, data = {}, id = String(this.events.length + 1)) {
    this.events.push([id, type, data]);
    for (const wake of [...this.wakes]) wake();
  }

  count(n) {
    for (let step = 1; step <= n; step++) this.say("progress", { step });
  }

  after(cursor) {
    const at = this.events.findIndex(([id]) => id === cursor);
    if (cursor === "now") return [];
    if (cursor === "latest") return this.events.slice(-1);
    return this.events.slice(at + 1);
  }

  get ended() {
    return this.events.at(-1)?.[1] === "stream.end";
  }

  /** Call `send` with each event behind `cursor`, now and later, until `send` says false. */
  feed(cursor, send, signal) {
    this.open.add(send);
    if (cursor === "now") cursor = this.events.at(-1)?.[0] ?? "";
    const pump = () => {
      for (const event of this.after(cursor)) {
        cursor = event[0];
        send(event);
      }
      if (this.ended) stop();
    };
    const stop = () => (this.wakes.delete(pump), this.open.delete(send), send(undefined));
    signal.addEventListener("abort", stop);
    this.wakes.add(pump);
    queueMicrotask(pump);
    return stop;
  }

  cut() {
    for (const send of [...this.open]) send(new Error("cut"));
  }

  async fetch(url, { headers, signal }) {
    const accept = headers.Accept;
    this.requests.push({ url: new URL(url), accept, headers });
    await null;
    await this.holds[new URL(url).searchParams.get("after") ?? ""];
    if (signal.aborted) throw signal.reason;
    const status = this.refuse(url, accept, headers);
    if (status === 0) throw new TypeError("fetch failed");
    if (status) return Response.json({ detail: `refused with ${status}` }, { status });
    if (url.pathname.endsWith("/result")) return Response.json(this.result);
    const cursor = url.searchParams.get("after") ?? "";
    if (accept === "application/json") return this.page(cursor, Number(url.searchParams.get("wait") ?? 0), signal);
    if (this.ended && cursor === this.events.at(-1)[0]) return new Response(null, { status: 204 });
    if (this.swallows) return await new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
    return this.stream(cursor, signal);
  }

  async page(cursor, wait, signal) {
    if (wait && !this.after(cursor).length && !this.ended)
      await new Promise((resolve, reject) => {
        const done = () => (this.wakes.delete(done), resolve());
        this.wakes.add(done);
        setTimeout(done, wait * 1000);
        signal.addEventListener("abort", () => (done(), reject(signal.reason)));
      });
    const events = this.after(cursor).map(([id, type, data]) => ({ id, type, data }));
    const known = /^(now|latest)?$/.test(cursor) ? this.events.at(-1)?.[0] ?? "0" : cursor;
    return Response.json({ events, next: events.at(-1)?.id ?? known, ended: this.ended });
  }

  stream(cursor, signal) {
    const encoder = new TextEncoder();
    let pieces = [":\n\n", "retry: 7\n\n"];
    const body = new ReadableStream({
      start: (controller) => {
        const write = (text) => {
          const at = Math.floor(text.length / 2); // cut in the middle, as the network does
          for (const piece of [text.slice(0, at), text.slice(at)]) controller.enqueue(encoder.encode(piece));
        };
        pieces.forEach(write);
        const stop = this.feed(
          cursor,
          (event) => {
            try {
              if (event instanceof Error) return stop(), controller.error(event);
              if (!event) return controller.close();
              write(`id: ${event[0]}\nevent: ${event[1]}\ndata: ${JSON.stringify(event[2])}\n\n`);
            } catch {
              // it was closed before
            }
          },
          signal,
        );
      },
    });
    return new Response(body, { headers: { "Content-Type": "text/event-stream; charset=utf-8" } });
  }
}

/** EventSource as WHATWG has it: it comes back behind the last id, until an answer is no stream. */
function eventSource(gateway) {
  return class EventSource extends EventTarget {
    readyState = 0;
    constructor(url, options) {
      super();
      gateway.sources++;
      this.url = new URL(url);
      this.options = options;
      this.cursor = this.url.searchParams.get("after") ?? "";
      this.life = new AbortController();
      queueMicrotask(() => this.connect());
    }
    connect() {
      if (this.life.signal.aborted || gateway.swallows) return;
      gateway.requests.push({ url: this.url, accept: "EventSource", ...this.options });
      const over = gateway.ended && this.cursor === gateway.events.at(-1)[0];
      const status = over ? 204 : gateway.refuse(this.url, "EventSource", {});
      if (status) return this.fail(status === 0 ? 0 : 2);
      this.readyState = 1;
      this.onopen?.();
      const stop = gateway.feed(
        this.cursor,
        (event) => {
          if (event && !(event instanceof Error)) return this.hear(event);
          if (event) stop();
          if (this.life.signal.aborted) return;
          this.fail(0);
          setTimeout(() => this.connect(), 5);
        },
        this.life.signal,
      );
    }
    hear([id, type, data]) {
      this.cursor = id;
      this.dispatchEvent(Object.assign(new Event(type), { lastEventId: id, data: JSON.stringify(data) }));
    }
    fail(state) {
      if (this.life.signal.aborted) return;
      this.readyState = state;
      this.onerror?.(new Event("error"));
    }
    close() {
      this.readyState = 2;
      this.life.abort();
    }
  };
}

class Locks {
  queues = new Map();
  request(name, { signal }, callback) {
    const queue = this.queues.get(name) ?? [];
    this.queues.set(name, queue);
    return new Promise((resolve, reject) => {
      const entry = async () => {
        resolve(await callback({ name }));
        queue.shift();
        queue[0]?.();
      };
      signal.addEventListener("abort", () => {
        const at = queue.indexOf(entry);
        if (at > 0) queue.splice(at, 1), reject(signal.reason);
      });
      queue.push(entry);
      if (queue.length === 1) setTimeout(entry);
    });
  }
}

const channels = new Set();
let losing = false; // messages between tabs get lost
class Channel {
  constructor(name) {
    this.name = name;
    channels.add(this);
  }
  postMessage(data) {
    const copy = structuredClone(data);
    if (losing) return;
    for (const other of channels)
      if (other !== this && other.name === this.name) setTimeout(() => channels.has(other) && other.onmessage({ data: copy }));
  }
  close() {
    channels.delete(this);
  }
}

let gateway, followings;

beforeEach(() => {
  gateway = new Gateway();
  followings = [];
  losing = false;
  channels.clear();
  Object.assign(globalThis, { fetch: gateway.fetch.bind(gateway), EventSource: eventSource(gateway) });
  globalThis.BroadcastChannel = Channel;
  globalThis.WebSocket = undefined;
  Object.defineProperty(globalThis, "navigator", { value: { locks: new Locks() }, configurable: true });
});

afterEach(() => followings.forEach((one) => one.close()));

/** A tab: what it has been given, in order. */
function tab(options = {}, target = { base: BASE, run: "r1" }) {
  const seen = [];
  const one = follow(target, { onEvent: ({ id, type }) => seen.push(`${id} ${type}`), ...options });
  followings.push(one);
  return Object.assign(one, { seen });
}

async function until(predicate, what = predicate) {
  for (const end = Date.now() + 5000; !predicate(); ) {
    assert.ok(Date.now() < end, `not within 5 s: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}

const wanted = () => gateway.events.map(([id, type]) => `${id} ${type}`);
const NATIVE = { types: ["progress"] };

for (const [name, options] of [["fetch", {}], ["EventSource", NATIVE]]) {
  test(`${name}: every event once, in order, then the result`, async () => {
    const one = tab(options);
    gateway.count(3);
    await until(() => one.seen.length === 3);
    gateway.say(...END);
    assert.equal(await one.result, 42);
    assert.deepEqual(one.seen, wanted());
    assert.equal(gateway.sources, name === "EventSource" ? 1 : 0);
    assert.equal(gateway.open.size, 0);
  });

  test(`${name}: a cut is continued behind the last event`, async () => {
    const one = tab(options);
    gateway.count(2);
    await until(() => one.seen.length === 2);
    gateway.cut();
    gateway.count(2);
    await until(() => one.seen.length === 4);
    gateway.cut();
    gateway.say(...END);
    assert.equal(await one.result, 42);
    assert.deepEqual(one.seen, wanted());
  });

  test(`${name}: a gateway that is away for a while is found again`, async () => {
    const one = tab(options);
    gateway.count(2);
    await until(() => one.seen.length === 2);
    gateway.refuse = () => 503;
    gateway.cut();
    await until(() => gateway.requests.length > 4);
    gateway.refuse = () => undefined;
    gateway.say(...END);
    assert.equal(await one.result, 42);
    assert.deepEqual(one.seen, wanted());
  });

  test(`${name}: a refusal surfaces with its status and its words`, async () => {
    gateway.refuse = () => 401;
    const one = tab(options);
    await assert.rejects(one.result, (error) => error instanceof TaskError && error.status === 401 && /refused with 401/.test(error));
    await assert.rejects(async () => { for await (const _ of one); }, TaskError);
  });

  test(`${name}: a stream that is swallowed is left for polling, and tried again later`, async () => {
    gateway.swallows = true;
    const one = tab(options);
    gateway.count(2);
    await until(() => one.seen.length === 2);
    await until(() => one.via === "poll");
    gateway.swallows = false;
    await until(() => one.via === "stream");
    gateway.count(1);
    gateway.say(...END);
    assert.equal(await one.result, 42);
    assert.deepEqual(one.seen, wanted());
  });

  test(`${name}: a run that has ended before is told from its stored result`, async () => {
    gateway.say("stream.end", { status: "FAILED" });
    gateway.result = { status: "FAILED", error: { message: "it broke" } };
    const one = tab({ ...options, after: "1" });
    await assert.rejects(one.result, (error) => error.status === "FAILED" && error.message === "it broke");
    assert.deepEqual(one.seen, []);
  });

  test(`${name}: two tabs share one connection; the next one leads on without loss or repeat`, async () => {
    const [first, second] = [tab(options), tab(options)];
    gateway.count(3);
    await until(() => first.seen.length === 3 && second.seen.length === 3);
    await until(() => gateway.open.size === 1);
    assert.deepEqual([first.via, second.via], ["stream", "shared"]);
    const third = tab(options); // late: it reads what it missed by itself
    await until(() => third.seen.length === 3 && gateway.open.size === 1);
    first.close();
    gateway.count(3);
    await until(() => second.seen.length === 6 && third.seen.length === 6);
    await until(() => gateway.open.size === 1);
    gateway.say(...END);
    assert.deepEqual(await Promise.all([second.result, third.result]), [42, 42]);
    assert.deepEqual(second.seen, wanted());
    assert.deepEqual(third.seen, wanted());
    await assert.rejects(first.result, { name: "AbortError" });
  });
}

test("a tab that hears nothing from the leader reads by itself, and in step again lets go", async () => {
  const [first, second] = [tab(), tab()];
  gateway.count(1);
  await until(() => second.via === "shared" && second.seen.length === 1);
  losing = true;
  gateway.count(2);
  await until(() => second.seen.length === 3);
  assert.equal(gateway.open.size, 2);
  losing = false;
  gateway.count(1);
  await until(() => gateway.open.size === 1);
  gateway.say(...END);
  await Promise.all([first.result, second.result]);
  assert.deepEqual(first.seen, wanted());
  assert.deepEqual(second.seen, wanted());
});

test("a message between tabs that got lost is a gap that is read, not skipped", async () => {
  const [first, second] = [tab(), tab()];
  gateway.count(1);
  await until(() => second.via === "shared" && second.seen.length === 1);
  losing = true;
  gateway.count(1);
  await until(() => first.seen.length === 2);
  losing = false;
  gateway.count(5);
  gateway.say(...END);
  await Promise.all([first.result, second.result]);
  assert.deepEqual(second.seen, wanted());
});

/** A generator of numbers in [0, 1), so that what fails can be repeated (mulberry32). */
function random(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

test("tabs that come, die and lose messages over a line that breaks: each sees all, once, in order", async (t) => {
  const seed = Number(process.env.BULKHEAD_SEED ?? Math.floor(Math.random() * 2 ** 31));
  t.diagnostic(`BULKHEAD_SEED=${seed}`);
  const chance = random(seed);
  const tabs = [tab(), tab(NATIVE), tab(NATIVE)];
  for (let step = 0; step < 300; step++) {
    const dice = chance();
    if (dice < 0.6) gateway.say("progress", { step });
    else if (dice < 0.65) gateway.cut();
    else if (dice < 0.7) losing = !losing;
    else if (dice < 0.73) gateway.refuse = gateway.refuse() ? () => undefined : () => [0, 503][step % 2];
    else if (dice < 0.76) tabs.push(tab(chance() < 0.5 ? {} : NATIVE));
    else if (dice < 0.78 && tabs.length > 3) tabs.shift().close();
    else await new Promise((resolve) => setTimeout(resolve, chance() * 8));
  }
  losing = false;
  gateway.refuse = () => undefined;
  gateway.say(...END);
  for (const one of tabs) assert.equal(await one.result, 42);
  for (const one of tabs) assert.deepEqual(one.seen, wanted(), `BULKHEAD_SEED=${seed}`);
});

test("without locks, or when told, each has a connection of its own", async () => {
  const [first, second] = [tab({ share: false }), tab({ share: false })];
  Object.defineProperty(globalThis, "navigator", { value: {}, configurable: true });
  const third = tab();
  gateway.count(1);
  await until(() => [first, second, third].every(({ seen }) => seen.length === 1));
  assert.equal(gateway.open.size, 3);
  assert.equal(channels.size, 0);
});

test("tags are shared only among those who say who they are", async () => {
  const target = { base: BASE, tags: ["t"] };
  tab({}, target);
  await until(() => gateway.open.size === 1);
  assert.equal(channels.size, 0);
  tab({ share: "ada" }, target);
  await until(() => channels.size === 1);
});

test("many runs come on one connection that the last of their ends ends", async () => {
  const paged = (url, accept) => (accept === "application/json" ? 406 : undefined);
  gateway.refuse = paged;
  const one = tab(NATIVE, { base: BASE, runs: ["r1", "r2"] });
  gateway.say("stream.end", { _run: "r1" });
  gateway.say("progress", { _run: "r2" });
  await until(() => one.seen.length === 2);
  gateway.refuse = () => 503;
  gateway.cut();
  await until(() => gateway.requests.length > 3);
  gateway.refuse = paged;
  gateway.say("stream.end", { _run: "r2" });
  assert.equal(await one.result, undefined);
  assert.deepEqual(one.seen, wanted());
  const url = `${BASE}api/v1/events?run=r1&run=r2&until=done&types=progress`;
  assert.equal(gateway.requests[0].url.href, url);
  assert.ok(gateway.requests.every(({ accept }) => accept === "text/event-stream"), "there are no pages of many runs");
});

test("many runs can be joined now", async () => {
  gateway.count(2);
  const one = tab({ after: "now", share: "ada" }, { base: BASE, tags: ["t"] });
  await until(() => gateway.open.size === 1);
  gateway.count(1);
  await until(() => one.seen.length === 1);
  gateway.cut();
  gateway.count(1);
  await until(() => one.seen.length === 2);
  assert.deepEqual(one.seen, ["3 progress", "4 progress"]);
  assert.deepEqual(gateway.requests.map(({ url }) => url.searchParams.get("after")), ["now", "3"]);
});

test("a silent stream of many runs is dead: heartbeats are heard", async () => {
  tab({}, { base: BASE, tags: ["t"] });
  await until(() => gateway.requests.length >= 2);
});

test("a refusal of many runs surfaces as well", async () => {
  gateway.refuse = () => 404;
  await assert.rejects(tab({}, { base: BASE, runs: ["r1"] }).result, (error) => error.status === 404);
});

test("what a gateway repeats is not handed out again", async () => {
  const one = tab();
  gateway.count(2);
  await until(() => one.seen.length === 2);
  for (const send of gateway.open) gateway.events.forEach(send);
  gateway.say(...END);
  await one.result;
  assert.deepEqual(one.seen, wanted());
});

test("a refused token is asked for anew, once", async () => {
  let asked = 0;
  gateway.refuse = (url, accept, { Authorization }) => (Authorization === "Bearer new" ? undefined : 401);
  const one = tab({ token: "old", refresh: async () => (asked++, { token: "new" }) });
  gateway.count(1);
  await until(() => one.seen.length === 1);
  gateway.refuse = () => 403;
  gateway.cut();
  await assert.rejects(one.result, (error) => error.status === 403);
  assert.equal(asked, 2, "what worked in between may be refreshed again");
});

test("a ticket goes into one URL", async () => {
  const one = tab({ ...NATIVE, ticket: "T" });
  gateway.count(1);
  await until(() => one.seen.length === 1);
  gateway.refuse = (url, accept) => (accept === "EventSource" ? 503 : undefined);
  gateway.cut();
  await until(() => gateway.requests.length > 3);
  const withTicket = gateway.requests.filter(({ url }) => url.searchParams.has("ticket"));
  assert.ok(withTicket.every(({ accept, withCredentials }) => accept === "EventSource" && withCredentials));
  assert.ok(!gateway.requests.at(-1).url.searchParams.has("ticket"));
});

test("`now` is pinned before the stream: a cut in silence loses nothing", async () => {
  gateway.count(3);
  const one = tab({ after: "now" });
  await until(() => gateway.open.size === 1);
  assert.equal(one.cursor, "3");
  gateway.cut();
  gateway.count(1);
  await until(() => one.seen.length === 1);
  assert.deepEqual(one.seen, ["4 progress"]);
});

test("who begins at the start is not led astray by who begins now", async () => {
  gateway.count(3);
  const free = {};
  for (const name of ["now", ""]) gateway.holds[name] = new Promise((resolve) => (free[name] = resolve));
  const now = tab({ after: "now" });
  await until(() => gateway.requests.length === 1);
  const all = tab();
  await until(() => gateway.requests.length === 2);
  free.now(); // it leads, and begins behind the third event
  await until(() => now.cursor === "3");
  await new Promise((resolve) => setTimeout(resolve, 20));
  free[""]();
  gateway.count(1);
  gateway.say(...END);
  await Promise.all([now.result, all.result]);
  assert.deepEqual(now.seen, wanted().slice(3));
  assert.deepEqual(all.seen, wanted());
});

test("who begins now is not given by another tab what was before", async () => {
  const all = tab();
  await until(() => gateway.open.size === 1 && channels.size === 1);
  let free;
  gateway.holds.now = new Promise((resolve) => (free = resolve));
  const now = tab({ after: "now" });
  await until(() => gateway.requests.length === 2);
  gateway.count(2);
  await until(() => all.seen.length === 2);
  await new Promise((resolve) => setTimeout(resolve, 20));
  free();
  await until(() => now.cursor === "2");
  gateway.say(...END);
  await now.result;
  assert.deepEqual(now.seen, ["3 stream.end"]);
});

test("a reset begins anew, ids that come again included", async () => {
  const one = tab();
  gateway.count(2);
  await until(() => one.seen.length === 2);
  gateway.cut();
  gateway.events = [["0", "stream.reset", { from: 1 }]];
  gateway.say("progress", {}, "1");
  gateway.say("stream.end", END[1], "3");
  await one.result;
  assert.deepEqual(one.seen, ["1 progress", "2 progress", ...wanted()]);
});

test("names in `on` are what is listened to", async () => {
  const heard = [];
  const one = tab({ onEvent: undefined, on: { month: ({ data }) => heard.push(data) } });
  gateway.say("other");
  gateway.say("month", { n: 1 });
  gateway.say(...END);
  assert.equal(await one.result, 42);
  assert.deepEqual(heard, [{ n: 1 }]);
  assert.equal(gateway.sources, 1);
});

test("a large result is fetched, not repeated in the last event", async () => {
  gateway.say("stream.end", { status: "SUCCESSFUL" });
  gateway.result = { status: "SUCCESSFUL", result: "large" };
  assert.equal(await tab().result, "large");
});

test("iterating gives every event and ends with the run", async () => {
  const one = tab();
  const seen = [];
  gateway.count(2);
  gateway.say(...END);
  for await (const { id, type } of one) seen.push(`${id} ${type}`);
  assert.deepEqual(seen, wanted());
});

test("a mistake in a callback is told, and stops nothing", async () => {
  const told = new Promise((resolve) => (globalThis.reportError = resolve));
  const one = tab({ onEvent: () => { throw new Error("the page's own"); } });
  gateway.say(...END);
  assert.equal(await one.result, 42);
  assert.match((await told).message, /the page's own/);
});

test("a signal closes it, and nothing stays open", async () => {
  const stop = new AbortController();
  const one = tab({ signal: stop.signal });
  gateway.count(1);
  await until(() => one.seen.length === 1);
  stop.abort();
  await assert.rejects(one.result, { name: "AbortError" });
  assert.equal(gateway.open.size, 0);
  assert.equal(channels.size, 0);
});

test("where streams are swallowed, WebSocket comes before polling", async () => {
  gateway.swallows = true;
  const sent = [];
  globalThis.WebSocket = class {
    life = new AbortController();
    constructor(url) {
      this.url = url;
      setTimeout(() => this.onopen());
    }
    send(text) {
      const { after } = JSON.parse(text);
      sent.push(`${this.url} ${text}`);
      gateway.feed(after, (one) => one && this.onmessage({ data: JSON.stringify({ type: "event", id: one[0], event: one[1], data: one[2] }) }), this.life.signal);
    }
    close() {
      this.life.abort();
    }
  };
  const one = tab({ token: "T" });
  await until(() => one.via === "socket");
  gateway.count(2);
  await until(() => one.seen.length === 2);
  gateway.say(...END);
  assert.equal(await one.result, 42);
  assert.deepEqual(one.seen, wanted());
  assert.deepEqual(sent, ['ws://gateway.test/ws?token=T {"type":"subscribe","run":"r1","after":"0"}']);
});
