// The page of `minigpt serve`. It asks the endpoints that programs ask, and nothing else.
// What comes from outside gets into the page by textContent only.
"use strict";

const ALTERNATIVES = 5; // how many of the most likely tokens to ask for at each place
const POLL = 2000; // ms between looks at the pipeline
const MINUTE = 60000 / POLL; // looks in a chart
const STEP = 220; // ms that a pulse takes from one box to the next: slow motion, a token takes a few
const MAX_TRIP = 1000; // ms of a pulse, however many stages
const MAX_PULSES = 8; // waiting or under way; more tokens than that are not shown one by one
const CELLS = 36; // of the pattern on a line
const SEALS = "sealing", WIRE = "lines between";

const $ = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");

let model = "";
let stages = []; // as /v1/attestation has them
let shown = []; // what is shown of each stage: its verdict and, where that is bad, the reasons
let running = null; // AbortController of the request under way
let generated = []; // the tokens shown: {text, logprob, top, element}
let asked = null; // the body of the last request

/** A new element. Attributes that are undefined are left out. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined) element.setAttribute(name, value);
  element.append(...children); // strings become text
  return element;
}

// ---- the server ----

/** fetch. Where the server wants a key, the browser has asked for it already, and sends it. */
const ask = (path, options = {}) => fetch(path, { ...options, headers: { "Content-Type": "application/json" } });

/** The JSON events of an OpenAI stream, until [DONE]. */
async function* events(response) {
  let rest = "";
  for await (const bytes of chunks(response.body.pipeThrough(new TextDecoderStream()))) {
    const lines = (rest + bytes).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
  throw new Error("The answer broke off before its end.");
}

async function* chunks(stream) { // not every browser iterates streams
  const reader = stream.getReader();
  for (let next; !(next = await reader.read()).done; ) yield next.value;
}

// ---- a request ----

async function send(prompt) {
  if (running || !$("form").reportValidity()) return;
  const number = (id) => Number($(id).value);
  // A seed of our own, so that the lines to copy give the same text.
  const seed = $("seed").value === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : number("seed");
  asked = { model, prompt, max_tokens: number("max_tokens"), temperature: number("temperature"), top_p: number("top_p"), seed };
  running = new AbortController();
  begin(prompt);
  const clock = { sent: performance.now(), spans: [] };
  let reason = null;
  try {
    const more = { stream: true, logprobs: ALTERNATIVES, stream_options: { include_usage: true }, minigpt: { spans: true } };
    const body = JSON.stringify({ ...asked, ...more });
    const response = await ask("/v1/completions", { method: "POST", body, signal: running.signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const [choice] = event.choices;
      if (!choice) continue; // usage
      take(choice, clock, event.minigpt?.spans);
      reason = choice.finish_reason ?? reason;
      clock.resumed = event.minigpt?.resumed ?? 0;
    }
  } catch (error) {
    reason = error.name === "AbortError" ? "cancelled" : "error";
    if (reason === "error") fail(error);
  }
  running = null;
  finish(reason, clock);
}

function sendThis(text) {
  $("prompt").value = text;
  $("prompt").focus();
  send(text);
}

function begin(prompt) {
  hideCard();
  generated = [];
  $("given").textContent = prompt;
  $("continuation").replaceChildren();
  $("continuation").tabIndex = -1;
  for (const id of ["empty", "problem", "more", "legend"]) $(id).hidden = true;
  $("text").hidden = $("foot").hidden = false;
  $("outcome").textContent = "";
  $("go").textContent = "Stop";
  document.body.classList.add("busy");
  showCode();
  travel([[0, "down"]]);
}

/** Shows the tokens of one chunk. */
function take(choice, clock, spans) {
  const { tokens = [], token_logprobs: logprobs = [], top_logprobs: top } = choice.logprobs ?? {};
  if (!choice.text && !logprobs.length) return;
  clock.first ??= performance.now();
  clock.last = performance.now();
  clock.count = (clock.count ?? 0) + Math.max(1, logprobs.length);
  if (spans?.length) clock.spans.push(spans.flat());
  const apart = tokens.length > 1 && tokens.join("") === choice.text;
  // Tokens that make a character together are shown as one, as likely as all of them.
  if (apart) tokens.forEach((text, i) => add(text, logprobs[i], top?.[i]));
  else add(choice.text, logprobs.reduce((sum, each) => sum + each, 0), top?.[0]);
  pulse();
  if (clock.last - (clock.shown ?? clock.first) > 500) {
    clock.shown = clock.last;
    showTime(clock.spans);
  }
}

let scrolling = 0;
let held = 0; // the logprob of tokens that are not a character yet
function add(text, logprob, top) {
  if (!text) return void (held += logprob);
  const token = { text, logprob: logprob + held, top: held ? undefined : top };
  held = 0;
  token.element = make("span", { id: `token-${generated.length}`, role: "option", "aria-selected": "false" }, text);
  token.element.style.setProperty("--surprise", (1 - Math.exp(token.logprob)).toFixed(3));
  generated.push(token);
  $("continuation").append(token.element);
  scrolling ||= requestAnimationFrame(() => { // once a frame: each time costs a layout of the whole text
    scrolling = 0;
    $("sheet").scrollTop = $("sheet").scrollHeight;
  });
  $("last").textContent = text.trim() || "↵";
  $("last").hidden = false;
}

const REASONS = { stop: "; the model ended the text", cancelled: "; stopped by you" };

function finish(reason, clock) {
  held = 0;
  document.body.classList.remove("busy");
  $("go").textContent = "Send";
  $("last").hidden = true;
  const pace = clock.count > 1 ? `, then ${ms((clock.last - clock.first) / (clock.count - 1))} each` : "";
  const tokens = clock.count === 1 ? "1 token" : `${clock.count} tokens`;
  const count = clock.count ? `${tokens}: first after ${ms(clock.first - clock.sent)}${pace}` : "no token";
  const resumed = clock.resumed ? `; resumed ${clock.resumed === 1 ? "once" : `${clock.resumed} times`} after a stage had died` : "";
  $("outcome").textContent = reason === "error" ? "" : count + (REASONS[reason] ?? "") + resumed;
  $("more").hidden = $("legend").hidden = !generated.length;
  if (generated.length) $("continuation").tabIndex = 0;
  say(generated.map((token) => token.text).join(""));
  showTime(clock.spans);
  if (reason === "error") look();
}

function fail(error) {
  const gone = error instanceof TypeError; // fetch's own
  $("problem").textContent = gone ? "The server does not answer: is `minigpt serve` running?" : error.message;
  $("problem").hidden = false;
  $("problem").scrollIntoView({ block: "nearest" }); // below a long text it would not be seen
}

const say = (text) => ($("news").textContent = text); // to those who listen

// ---- about a token ----

let selected = null; // the token that the card is about

function select(token) {
  selected?.element.setAttribute("aria-selected", "false");
  token?.element.setAttribute("aria-selected", "true");
  selected = token;
}

function showCard(token, focus = false) {
  select(token);
  $("continuation").setAttribute("aria-activedescendant", token.element.id);
  const others = Object.entries(token.top ?? {}).map(([text, logprob]) => [text, Math.exp(logprob)]);
  others.sort((one, other) => other[1] - one[1]);
  const own = Math.exp(token.logprob);
  if (!others.length) others.push([token.text, own], [null, 1 - own]);
  const rows = others.map(([text, p]) => {
    const bar = make("i");
    bar.style.setProperty("--p", p.toFixed(4));
    const parts = [make("span", {}, text === null ? "all other tokens" : visible(text)), bar, make("b", {}, percent(p))];
    if (text === token.text) return make("div", { class: "own" }, ...parts);
    if (text === null || text.startsWith("bytes:")) return make("div", {}, ...parts); // nothing to continue from
    const row = make("button", { type: "button" }, ...parts);
    row.addEventListener("click", () => branch(token, text));
    return row;
  });
  const place = `token ${generated.indexOf(token) + 1} of ${generated.length}, ${surprise(own)}`;
  $("card").replaceChildren(make("p", {}, place), ...rows);
  $("card").hidden = false;
  const at = token.element.getClientRects()[0], { width, height } = $("card").getBoundingClientRect();
  $("card").style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
  $("card").style.top = `${at.bottom + height + 8 < innerHeight ? at.bottom : at.top - height}px`; // no gap: the pointer may go there
  if (focus) $("card").querySelector("button")?.focus();
}

function hideCard() {
  $("card").hidden = true;
  select(null);
}

/** Continues from an alternative. */
function branch(token, text) {
  const before = generated.slice(0, generated.indexOf(token)).map((each) => each.text);
  sendThis($("given").textContent + before.join("") + text);
}

const visible = (text) => text.replaceAll("\n", "↵").replaceAll(" ", "␣");
const percent = (p) => (p > 0.9995 ? "> 99.9 %" : p < 0.001 ? "< 0.1 %" : `${(100 * p).toFixed(1)} %`);
const surprise = (p) => (p > 0.8 ? "as expected" : p > 0.3 ? "plausible" : p > 0.05 ? "a surprise" : "a great surprise");
const ms = (time) => `${time < 10 ? time.toFixed(1) : Math.round(time)} ms`;

// ---- the pipeline ----

/** Looks at the evidence and the metrics. */
async function look() {
  try {
    const [attestation, metrics] = await Promise.all([ask("/v1/attestation"), ask("/metrics")]);
    const found = await attestation.json();
    if (!attestation.ok) throw new Error(found.error.message);
    showStages(found);
    chart(await metrics.text());
  } catch (error) {
    showState("bad", error instanceof TypeError ? "server does not answer" : error.message);
    for (const stage of stages) showStage(stage, "unasked");
    shown = [];
  }
}

/** "pass", "fail" (evidence refused), "gone" (it does not answer) or "unasked" (one before it does not). */
function verdict({ verdict, checks }) {
  if (verdict === "UNKNOWN") return checks[0]?.startsWith("not asked") ? "unasked" : "gone";
  return verdict === "PASS" ? "pass" : "fail";
}

const WORDS = { // of a verdict: the badge, what it says, and the line before the stage
  pass: ["PASS", "proved its code", "sealed"], fail: ["FAIL", "did not prove its code", "closed: nothing is sent"],
  gone: ["SILENT", "does not answer", "no connection"], unasked: ["UNKNOWN", "not asked", "no connection"],
};

function showState(kind, text) {
  if ($("state").className === kind && $("state").lastChild.textContent === text) return; // or it is read out again
  $("state").className = kind;
  $("state").lastChild.textContent = text;
}

function showStages(found) {
  const same = stages.length === found.stages.length;
  stages = found.stages;
  if (!same) build();
  const before = shown;
  shown = stages.map((stage) => [verdict(stage), ...(verdict(stage) === "pass" ? [] : stage.checks)].join("\n"));
  stages.forEach((stage, i) => {
    if (shown[i] === before[i]) return;
    const now = verdict(stage), then = before[i]?.split("\n")[0] ?? "unasked";
    showStage(stage, now);
    if (now !== then && now !== "unasked" && then !== "unasked") say(`Stage ${stage.index} ${now === "pass" ? "is back" : WORDS[now][1]}`);
  });
  const wrong = stages.find((stage) => verdict(stage) in { fail: 1, gone: 1 });
  if (wrong) showState("bad", `stage ${wrong.index} ${WORDS[verdict(wrong)][1]}`);
  else showState("good", "ready");
  showProof(found);
}

function build() {
  const layers = Math.max(...stages.map((stage) => stage.layers[1]));
  $("pipeline").replaceChildren($("client"));
  $("pipeline").classList.toggle("many", stages.length > 3);
  for (const stage of stages) {
    const strip = make("span", { class: "layers", "aria-hidden": "true" });
    const [first, end] = stage.layers;
    for (let i = 0; i < layers; i++) strip.append(make("i", { class: i >= first && i < end ? "on" : undefined }));
    const carries = make("small", {}, stage.index ? "half-computed numbers" : "token numbers");
    const title = make("h3", {}, `Stage ${stage.index}`, make("small", {}, range(first, end)));
    const track = make("span", { class: "track", "aria-hidden": "true" });
    const line = make("li", { class: "line" }, track, make("p", {}, make("b"), make("span"), carries), noise());
    const about = make("div", {}, title, strip, make("p", { class: "where" }, stage.address ?? ""));
    const room = make("li", { class: "room stage" }, about, make("p", { class: "verdict" }), make("div", { class: "trouble" }));
    hue(room, stage.index);
    $("pipeline").append(line, room);
  }
}

/** What others see of a line: a pattern that means nothing, and changes with each packet. */
function noise(element) {
  element ??= make("span", { class: "noise", "aria-hidden": "true" }, ...Array.from({ length: CELLS }, () => make("i")));
  for (const cell of element.children) cell.style.opacity = String(0.12 + 0.88 * Math.random() ** 2);
  return element;
}

const range = (first, end) => (end - first === 1 ? `layer ${first}` : `layers ${first}–${end - 1}`);
const hue = (element, index) => element.style.setProperty("--hue", String((165 + 67 * index) % 360));

function showStage(stage, now) {
  const room = document.querySelectorAll(".stage")[stage.index], line = document.querySelectorAll(".line")[stage.index];
  const [badge, says, passage] = WORDS[now];
  room.className = `room stage ${now}`;
  line.className = `line ${now}`;
  line.querySelector("b").textContent = passage;
  const by = stage.simulated && now === "pass" ? ` (${stage.provider})` : "";
  room.querySelector(".verdict").replaceChildren(make("b", {}, badge), make("span", {}, says + by));
  const bad = now === "fail" || now === "gone";
  room.querySelector(".trouble").replaceChildren(...(bad ? trouble(stage, now) : []));
  if (bad) $("map").scrollTop = room.offsetTop + room.offsetHeight; // where the map is too high
}

/** What is wrong: got, wanted, and what to do, as the errors say it. */
function trouble(stage, now) {
  const failed = stage.checks.filter((check) => check.startsWith("FAIL "));
  const text = (failed.length ? failed : stage.checks).map((check) => check.replace("FAIL ", "")).join("; ");
  const [, what, got, wanted, then] = text.match(/^(.*?):? got (.*?), wanted ([^;]*)(?:; (.*))?$/s) ?? [, text];
  const rows = got ? [make("dt", {}, "Got"), make("dd", {}, got), make("dt", {}, "Wanted"), make("dd", {}, wanted)] : [];
  const remedy = now === "gone" ? "Start it again, and the page will notice."
    : "Nothing is sent to it. Start the code that the manifest pins, or get the manifest that fits.";
  return [make("p", {}, what), make("dl", {}, ...rows), make("p", {}, then ? `${then}. ${remedy}` : remedy)];
}

function showProof(found) {
  const tests = stages.some((stage) => stage.test_root), mock = tests || stages.some((stage) => stage.simulated);
  const names = [...new Set(stages.map((stage) => stage.provider))].join(", ");
  const text = `Only this machine and the stages see your text. ${mock ? `${tests ? "A test's root" : "Mock evidence"}: proves nothing about hardware.` : `Proved by ${names}.`}`;
  if ($("promise-text").textContent !== text) $("promise-text").textContent = text;
  $("promise").classList.toggle("mock", mock);
  $("mock").hidden = !mock;
  $("digest").textContent = found.manifest_sha256;
  if ($("proof").open) return; // do not replace what has the focus
  for (const link of $("evidence").querySelectorAll("a")) URL.revokeObjectURL(link.href);
  $("evidence").replaceChildren(...stages.map((stage) => {
    const until = stage.endorsed_until ? `, endorsed until ${stage.endorsed_until.slice(0, 10)}` : "";
    const says = make("span", {}, `${stage.verdict}, ${stage.provider}${until}`);
    const line = make("li", { class: verdict(stage) }, make("b", {}, `Stage ${stage.index}`), says);
    if (stage.evidence) {
      const href = URL.createObjectURL(new Blob([JSON.stringify(stage.evidence, null, 2)], { type: "application/json" }));
      line.append(make("a", { href, download: `stage-${stage.index}.json` }, `stage-${stage.index}.json`));
    }
    line.append(...stage.checks.map((check) => make("small", {}, check)));
    return line;
  }));
}

// ---- what moves ----

let pulses = 0; // under way or waiting
let nextPulse = 0; // when the next may start

/** A token's trip: down the stages and back, and then to this machine. */
function pulse() {
  if (pulses >= MAX_PULSES || !stages.length) return;
  const inner = stages.map((_, i) => i).slice(1);
  travel([...inner.map((i) => [i, "down"]), ...inner.reverse().map((i) => [i, "up"]), [0, "up"]]);
}

async function travel(trip) {
  const lines = document.querySelectorAll(".line");
  if (still.matches || document.hidden || !lines.length) return;
  const step = Math.min(STEP, MAX_TRIP / trip.length);
  const start = Math.max(performance.now(), nextPulse);
  nextPulse = start + step / 2;
  pulses++;
  await new Promise((resolve) => setTimeout(resolve, start - performance.now()));
  for (const [line, way] of trip) {
    const packet = make("span", { class: "packet" });
    lines[line].firstChild.append(packet);
    noise(lines[line].lastChild);
    const ends = [{ top: "0%" }, { top: "100%" }];
    await packet.animate(way === "down" ? ends : ends.reverse(), { duration: step, easing: "ease-in-out" }).finished;
    packet.remove();
    const reached = (way === "down" ? lines[line].nextSibling : lines[line].previousSibling);
    reached.animate([{ outlineColor: "var(--glow)" }, { outlineColor: "transparent" }], { duration: 500 });
  }
  pulses--;
}

/** Where the time of a token went, on average over those after the first. */
function showTime(spans) {
  const later = spans.length > 1 ? spans.slice(1) : spans;
  if (!later.length) return;
  const average = (i, name) => later.reduce((sum, spans) => sum + spans[i][name], 0) / later.length;
  const mean = later[0].map((span, i) => Object.fromEntries(Object.keys(span).map((name) => [name, average(i, name)])));
  const whole = (span) => span.compute + span.seal + span.open + span.wait;
  const [client, ...own] = mean;
  const parts = own.map((span, i) => [`stage ${i}`, span.compute, i]);
  parts.push([SEALS, mean.reduce((sum, span) => sum + span.seal + span.open, 0)]);
  parts.push([WIRE, mean.slice(0, -1).reduce((sum, span, i) => sum + Math.max(0, span.wait - whole(mean[i + 1])), 0)]);
  const shown = parts.map(([name, seconds, stage]) => {
    const piece = make("i", { class: stage === undefined ? (name === SEALS ? "seal" : "wire") : undefined });
    if (stage !== undefined) hue(piece, stage);
    const dot = piece.cloneNode();
    piece.style.flexGrow = String(1e6 * seconds); // a sum below 1 would not fill the bar
    return [piece, make("li", {}, dot, `${name} `, make("b", {}, `${(1000 * seconds).toFixed(2)}`))];
  });
  $("bar").replaceChildren(...shown.map(([piece]) => piece));
  $("bar").setAttribute("aria-label", parts.map(([name, seconds]) => `${name} ${(1000 * seconds).toFixed(2)} ms`).join(", "));
  $("parts").replaceChildren(...shown.map(([, line]) => line));
  $("total").textContent = `${(1000 * whole(client)).toFixed(2)} ms`;
  document.querySelectorAll(".line p span").forEach((label, i) => {
    label.textContent = `${Math.round(mean[i].bytes).toLocaleString("en")} bytes a token`;
  });
}

const history = { rate: [], queue: [] };
let seen = null; // {time, tokens} of the last look

function chart(text) {
  const sum = (name) => [...text.matchAll(new RegExp(`^${name}(?:\\{.*\\})? (\\S+)`, "gm"))].reduce((all, match) => all + Number(match[1]), 0);
  const now = { time: performance.now(), tokens: sum("minigpt_generated_tokens_total") };
  const rate = seen ? (1000 * (now.tokens - seen.tokens)) / (now.time - seen.time) : 0;
  seen = now;
  draw("rate", Math.max(0, rate));
  draw("queue", sum("minigpt_requests_waiting"));
}

function draw(id, value) {
  const values = history[id];
  values.push(value);
  if (values.length > MINUTE) values.shift();
  const most = Math.max(...values, 1);
  const points = values.map((each, i) => `${(120 * (i + MINUTE - values.length)) / (MINUTE - 1)},${31 - (29 * each) / most}`);
  $(id).querySelector("polyline").setAttribute("points", points.join(" "));
  $(id).querySelector("polygon").setAttribute("points", [`${points[0].split(",")[0]},32`, ...points, "120,32"].join(" "));
  const short = (number) => (number < 10 && number % 1 ? number.toFixed(1) : String(Math.round(number)));
  $(id).querySelector("output").textContent = short(value) + (most > value && most > 1 ? `, peak ${short(most)}` : "");
}

// ---- the same from a program ----

function showCode() {
  const body = asked ?? { model, prompt: $("prompt").value, max_tokens: 16 };
  const python = document.querySelector("[name=language]:checked").value === "python";
  const words = Object.entries(body).map(([name, value]) => `${name}=${JSON.stringify(value)}`).join(", ");
  const base = `${location.origin}/v1`;
  $("snippet").textContent = python
    ? `from openai import OpenAI\nclient = OpenAI(base_url="${base}", api_key="none")\nprint(client.completions.create(${words}).choices[0].text)`
    : `curl ${base}/completions -H 'Content-Type: application/json' \\\n  -d '${JSON.stringify(body).replaceAll("'", "'\\''")}'`;
}

async function copy() {
  try {
    await navigator.clipboard.writeText($("snippet").textContent);
    $("copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren($("snippet")); // plain HTTP from another host: Ctrl-C does it
    $("copy").textContent = "Selected";
  }
  setTimeout(() => ($("copy").textContent = "Copy"), 1500);
}

// ---- hands ----

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else send($("prompt").value);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send($("prompt").value);
});
$("more").addEventListener("click", () => sendThis($("text").textContent));
for (const each of document.querySelectorAll("#examples button")) each.addEventListener("click", () => sendThis(each.textContent));
const tokenOf = (element) => generated.find((token) => token.element === element);
$("continuation").addEventListener("mouseover", (event) => tokenOf(event.target) && showCard(tokenOf(event.target)));
$("continuation").addEventListener("focus", () => generated.length && showCard(selected ?? generated[0]));
$("continuation").addEventListener("keydown", (event) => {
  const at = generated.indexOf(selected), last = generated.length - 1;
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key];
  if (to !== undefined) showCard(generated[Math.max(0, Math.min(last, to))]);
  else if ((event.key === "Enter" || event.key === "ArrowDown") && at >= 0) showCard(generated[at], true);
  else return;
  event.preventDefault();
});
for (const kind of ["pointermove", "pointerdown"]) {
  document.addEventListener(kind, ({ target, type, pointerType }) => {
    if ($("card").hidden || target.closest("#continuation, #card")) return;
    if (type === "pointerdown" || (pointerType === "mouse" && document.activeElement !== $("continuation"))) hideCard();
  });
}
document.addEventListener("focusin", (event) => event.target.closest("#continuation, #card") ?? hideCard());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else if ($("card").contains(document.activeElement)) $("continuation").focus();
  else hideCard();
});
$("sheet").addEventListener("scroll", hideCard);
$("promise").addEventListener("click", () => $("proof").showModal());
$("copy").addEventListener("click", copy);
for (const each of document.querySelectorAll("[name=language]")) each.addEventListener("change", showCode);

async function start() {
  const [first] = (await (await ask("/v1/models")).json()).data;
  model = first.id;
  $("model").textContent = `${model}, ${first.max_model_len.toLocaleString("en")} tokens`;
  showCode();
}
start().catch(() => {});
(async () => {
  for (;;) {
    if (!document.hidden) await look();
    await new Promise((resolve) => setTimeout(resolve, POLL));
  }
})();
