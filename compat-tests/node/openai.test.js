// The OpenAI Node SDK against the demo model.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import net from "node:net";
import path from "node:path";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";
import OpenAI from "openai";

const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), "../..");
const binary = process.env.RVLLM ?? path.join(root, "target/release/rvllm");
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Get the current weather",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};
let server, client, log = "";

const freePort = () =>
  new Promise((resolve) => {
    const s = net.createServer().listen(0, "127.0.0.1", () => {
      const { port } = s.address();
      s.close(() => resolve(port));
    });
  });

before(async () => {
  const port = await freePort();
  const flags = "--enable-auto-tool-choice --tool-call-parser lfm2".split(" ");
  server = spawn(binary, ["serve", "demo", "--host", "127.0.0.1", "--port", `${port}`, ...flags]);
  for (const stream of [server.stdout, server.stderr]) stream.on("data", (data) => (log += data));
  client = new OpenAI({ baseURL: `http://127.0.0.1:${port}/v1`, apiKey: "none", maxRetries: 0 });
  for (const end = Date.now() + 60_000; ; ) {
    const up = await fetch(`http://127.0.0.1:${port}/health`).then((r) => r.ok, () => false);
    if (up) return;
    assert.ok(server.exitCode === null && Date.now() < end, `the server did not start:\n${log}`);
    await new Promise((r) => setTimeout(r, 50));
  }
});

after(() => server?.kill());

const ask = (content, more = {}) => ({ model: "demo", messages: [{ role: "user", content }], temperature: 0, ...more });

test("models", async () => {
  const models = (await client.models.list()).data;
  assert.deepEqual(models.map((m) => m.id), ["demo"]);
});

test("chat answers and stops", async () => {
  const r = await client.chat.completions.create(ask("Hello!"));
  assert.equal(r.choices[0].finish_reason, "stop");
  assert.ok(r.choices[0].message.content.length > 0);
  assert.equal(r.usage.total_tokens, r.usage.prompt_tokens + r.usage.completion_tokens);
});

test("a stream is the same answer", async () => {
  const whole = await client.chat.completions.create(ask("Count to 20"));
  let text = "", usage;
  for await (const chunk of await client.chat.completions.create(ask("Count to 20", { stream: true, stream_options: { include_usage: true } }))) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
});

test("reasoning is apart from the answer", async () => {
  const { message } = (await client.chat.completions.create(ask("What is 12 + 7?"))).choices[0];
  assert.ok(message.reasoning.length > 0);
  assert.equal(message.reasoning, message.reasoning_content);
  assert.ok(!message.content.includes("think>"));
});

test("a tool is called, and its result used", async () => {
  const question = ask("What is the weather in Marlowburg?", { tools: [weather] });
  const first = (await client.chat.completions.create(question)).choices[0];
  assert.equal(first.finish_reason, "tool_calls");
  const [call] = first.message.tool_calls;
  assert.equal(call.function.name, "get_weather");
  assert.deepEqual(JSON.parse(call.function.arguments), { city: "Marlowburg" });
  const second = await client.chat.completions.create({
    ...question,
    messages: [...question.messages, first.message, { role: "tool", tool_call_id: call.id, content: '{"temperature": 21, "condition": "sunny"}' }],
  });
  assert.equal(second.choices[0].finish_reason, "stop");
  assert.match(second.choices[0].message.content, /21/);
});

test("the SDK's stream helper assembles tool calls", async () => {
  const stream = client.chat.completions.stream(ask("What is the weather in Marlowburg?", { tools: [weather] }));
  const final = await stream.finalChatCompletion();
  const { message } = final.choices[0];
  assert.deepEqual(JSON.parse(message.tool_calls[0].function.arguments), { city: "Marlowburg" });
});

test("responses: a tool is called, and its result used", async () => {
  const tool = { type: "function", strict: false, ...weather.function };
  const question = { model: "demo", input: "What is the weather in Marlowburg?", temperature: 0, tools: [tool] };
  const first = await client.responses.create(question);
  const call = first.output.find((item) => item.type === "function_call");
  assert.deepEqual(JSON.parse(call.arguments), { city: "Marlowburg" });
  const output = '{"temperature": 21, "condition": "sunny"}';
  const items = [{ role: "user", content: question.input }, ...first.output, { type: "function_call_output", call_id: call.call_id, output }];
  let text = "", final;
  for await (const event of await client.responses.create({ ...question, input: items, stream: true })) {
    if (event.type === "response.output_text.delta") text += event.delta;
    if (event.type === "response.completed") final = event.response;
  }
  assert.match(text, /21/);
  assert.equal(final.output.at(-1).content[0].text, text);
});

test("completions", async () => {
  const r = await client.completions.create({ model: "demo", prompt: ["The capital of France is", "Hello"], max_tokens: 6, temperature: 0 });
  assert.deepEqual(r.choices.map((c) => c.index), [0, 1]);
});

test("an aborted stream leaves the server well", async () => {
  const stream = await client.chat.completions.create(ask("Count to 100", { stream: true }));
  for await (const _ of stream) {
    stream.controller.abort();
    break;
  }
  assert.ok((await client.chat.completions.create(ask("Hello!"))).choices[0].message.content);
});

test("errors are the SDK's classes", async () => {
  await assert.rejects(client.chat.completions.create({ ...ask("x"), model: "nope" }), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create(ask("x", { temperature: -1 })), OpenAI.BadRequestError);
});
