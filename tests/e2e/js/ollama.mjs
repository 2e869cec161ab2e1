// Each exported function is one test of the official "ollama" package; see test_js_clients.py.
import assert from 'node:assert/strict'
import { Ollama } from 'ollama'

const host = process.env.ALIGHT_URL
const client = new Ollama({ host })
const model = 'smollm2'
const messages = [{ role: 'user', content: 'What is the capital of France? Answer in one word.' }]
const options = { temperature: 0, num_predict: 24 }
const weather = {
  type: 'function',
  function: {
    name: 'weather',
    description: 'Tells the weather',
    parameters: { type: 'object', required: ['city'], properties: { city: { type: 'string' } } },
  },
}

async function all(stream) {
  const parts = []
  for await (const part of await stream) parts.push(part)
  return parts
}

async function refused(promise, status, named) {
  await assert.rejects(promise, (error) => error.status_code === status && named.test(error.message))
}

export async function chat() {
  const whole = await client.chat({ model, messages, options })
  assert.match(whole.message.content, /Paris/)
  assert.equal(whole.message.role, 'assistant')
  assert.ok(whole.done && ['stop', 'length'].includes(whole.done_reason))
  const durations = ['total_duration', 'load_duration', 'prompt_eval_duration', 'eval_duration']
  for (const key of [...durations, 'prompt_eval_count', 'eval_count'])
    assert.ok(Number.isInteger(whole[key]) && whole[key] > 0, key)
  const parts = await all(client.chat({ model, messages, options, stream: true }))
  assert.equal(parts.map((part) => part.message.content).join(''), whole.message.content)
  assert.equal(parts.at(-1).eval_count, whole.eval_count)
}

export async function chatWithTools() {
  const question = [{ role: 'user', content: 'What is the weather in Rome? Use the tool.' }]
  const called = { role: 'assistant', content: '', tool_calls: [{ function: { name: 'weather', arguments: { city: 'Rome' } } }] }
  const said = { role: 'tool', tool_name: 'weather', content: 'sun' }
  const asked = await client.chat({ model, messages: question, tools: [weather], options })
  for (const call of asked.message.tool_calls ?? []) assert.equal(typeof call.function.arguments, 'object')
  const answer = await client.chat({ model, messages: [...question, called, said], tools: [weather], options })
  assert.ok(answer.done)
}

export async function format() {
  const schema = { type: 'object', properties: { capital: { type: 'string' } }, required: ['capital'] }
  const answer = await client.chat({ model, messages, format: schema, options: { ...options, num_predict: 60 } })
  assert.deepEqual(Object.keys(JSON.parse(answer.message.content)), ['capital'])
  await refused(client.chat({ model, messages, format: 'yaml' }), 400, /invalid format/)
}

export async function logprobs() {
  const answer = await client.chat({ model, messages, options, logprobs: true, top_logprobs: 2 })
  assert.ok(answer.logprobs.length > 0)
  for (const one of answer.logprobs) assert.ok(one.logprob <= 0 && one.top_logprobs.length === 2)
}

export async function generate() {
  const whole = await client.generate({ model, prompt: 'Say hello.', system: 'Be brief.', options })
  assert.ok(whole.response && Array.isArray(whole.context))
  const parts = await all(client.generate({ model, prompt: 'Say hello.', system: 'Be brief.', options, stream: true }))
  assert.equal(parts.map((part) => part.response).join(''), whole.response)
  const raw = await client.generate({ model, prompt: 'One, two, three, four,', raw: true, options })
  assert.match(raw.response, /five/)
}

export async function abort() {
  const own = new Ollama({ host })
  const story = [{ role: 'user', content: 'Tell me a very long story about a lighthouse.' }]
  const stream = await own.chat({ model, messages: story, stream: true })
  await assert.rejects(async () => {
    let seen = 0
    for await (const part of stream) {
      assert.ok(!part.done)
      if (++seen === 3) own.abort()
    }
  }, { name: 'AbortError' })
  assert.ok((await client.chat({ model, messages, options: { num_predict: 2 } })).done)
}

export async function embed() {
  const made = await client.embed({ model, input: ['one cat', 'two dogs'] })
  assert.equal(made.embeddings.length, 2)
  assert.ok(made.total_duration > 0 && made.load_duration > 0 && made.prompt_eval_count > 0)
  const length = Math.hypot(...made.embeddings[0])
  assert.ok(Math.abs(length - 1) < 1e-4)
  const short = await client.embed({ model, input: 'one cat', dimensions: 32, truncate: true })
  assert.equal(short.embeddings[0].length, 32)
  assert.ok((await client.embeddings({ model, prompt: 'one cat' })).embedding.length > 100)
}

export async function library() {
  const statuses = await all(
    client.create({ model: 'Mario:v1', from: model, system: 'You are Mario.', parameters: { temperature: 0, stop: ['\n'] }, stream: true }),
  )
  assert.equal(statuses.at(-1).status, 'success')
  const shown = await client.show({ model: 'mario:v1' })
  assert.equal(shown.system, 'You are Mario.')
  assert.match(shown.parameters, /^stop\s+"\\n"$/m)
  assert.equal(shown.model_info['general.architecture'], 'llama')
  assert.deepEqual(shown.capabilities, ['completion'])
  assert.deepEqual(await client.copy({ source: 'mario:v1', destination: 'luigi' }), { status: 'success' })
  const names = (await client.list()).models.map((one) => one.name).sort()
  assert.deepEqual(names, ['luigi:latest', 'mario:v1', 'smollm2:latest'])
  for (const name of ['mario:v1', 'luigi']) assert.deepEqual(await client.delete({ model: name }), { status: 'success' })
  await refused(client.delete({ model: 'luigi' }), 404, /not found/)
  assert.equal((await client.create({ model: 'again', from: model })).status, 'success')
  await client.delete({ model: 'again' })
}

export async function running() {
  await client.generate({ model, prompt: '', keep_alive: '10m' })
  const [one] = (await client.ps()).models
  assert.equal(one.model, 'smollm2:latest')
  assert.ok(new Date(one.expires_at) > new Date() && one.size > 0 && one.size_vram === 0)
  assert.match((await client.version()).version, /^\d+\.\d+\.\d+$/)
}

export async function pull() {
  assert.equal((await client.pull({ model: 'builtin:smollm2' })).status, 'success')
  const parts = await all(client.pull({ model, stream: true }))
  assert.ok(parts.some((part) => part.digest?.startsWith('sha256:') && part.completed === part.total))
  await refused(client.pull({ model: 'llama3.2' }), 404, /hf:\/\//)
  await refused(client.push({ model }), 501, /not in this version/)
}

export async function blobs() {
  // The package does not send blobs; people who use it do it with fetch.
  const bytes = new TextEncoder().encode('no model')
  const hash = Buffer.from(await crypto.subtle.digest('SHA-256', bytes)).toString('hex')
  const url = `${host}/api/blobs/sha256:${hash}`
  assert.equal((await fetch(url, { method: 'HEAD' })).status, 404)
  assert.equal((await fetch(url, { method: 'POST', body: bytes })).status, 201)
  assert.equal((await fetch(url, { method: 'HEAD' })).status, 200)
  await refused(client.create({ model: 'x', files: { 'a.gguf': `sha256:${hash}` } }), 400, /not in GGUF format/)
}

export async function errors() {
  await refused(client.chat({ model: 'llama3.2', messages }), 404, /model 'llama3.2' not found/)
  await refused(client.chat({ model, messages, think: true }), 400, /does not support thinking/)
  await refused(client.chat({ model, messages: [{ role: 'user', content: 'x', images: [new Uint8Array([1])] }] }), 400, /images/)
  await refused(client.generate({ model, prompt: 'x', suffix: 'y' }), 400, /does not support insert/)
  await refused(client.chat({ model, messages, options: { temprature: 1 } }), 400, /temprature/)
  await refused(client.generate({ model, prompt: 'word '.repeat(5000) }), 400, /context/)
}
