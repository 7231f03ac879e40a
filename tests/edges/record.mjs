// Writes down everything an EventSource does. The same code in a browser and in node.

/** Names that the cases use: an EventSource hears only what it listens for. */
export function record(EventSource, url, options, names, until) {
  const source = new EventSource(url, options);
  const heard = {events: [], opens: 0, finals: [], closed: false, done: false};
  const finish = closed => { source.close(); heard.closed = closed; heard.done = true; };
  source.addEventListener("open", () => { heard.opens += 1; });
  for (const name of new Set(names)) {
    source.addEventListener(name, event => {
      if (event.data === undefined) return;  // the object's own `error`, not the stream's
      heard.events.push([event.lastEventId, event.type, event.data]);
      if (event.type === until) finish(false);
    });
  }
  source.addEventListener("error", event => {
    if (event.data !== undefined) return;  // the stream's `error`, not the object's own
    const final = source.readyState === 2;
    heard.finals.push(final);
    if (final) finish(true);
  });
  return {heard, close: () => finish(false)};
}
