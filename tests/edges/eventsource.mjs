// npm's `eventsource` under node: commands come as JSON lines, one answer each. argv: FOLDER_OF_NODE_MODULES
import {createRequire} from "node:module";
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";
import {record} from "./record.mjs";

const require = createRequire(pathToFileURL(`${process.argv[2]}/package.json`));
const {EventSource} = require("eventsource");
const open = new Map();

const COMMANDS = {
  open({id, url, token, names, until}) {
    const headers = token ? {Authorization: `Bearer ${token}`} : {};
    const fetch_ = (url, init) => fetch(url, {...init, headers: {...init.headers, ...headers}});
    open.set(id, record(EventSource, url, {fetch: fetch_}, names, until));
    return {};
  },
  peek({id}) {
    const {heard} = open.get(id);
    return {count: heard.events.length, opens: heard.opens, done: heard.done};
  },
  take({id}) { return open.get(id).heard; },
  close({id}) { open.get(id).close(); open.delete(id); return {}; },
};

for await (const line of createInterface({input: process.stdin})) {
  const command = JSON.parse(line);
  process.stdout.write(JSON.stringify(COMMANDS[command.op](command)) + "\n");
}
process.exit(0);
