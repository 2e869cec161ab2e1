// Each exported function is one test of the official "openai" package; see test_js_clients.py.
import assert from 'node:assert/strict'
import OpenAI from 'openai'

const client = new OpenAI({ baseURL: `${process.env.ALIGHT_URL}/v1`, apiKey: 'none', maxRetries: 0 })
const model = 'smollm2'
const messages = [{ role: 'user', content: 'What is the capital of France? Answer in one word.' }]
const few = { model, messages, temperature: 0, max_tokens: 24 }

export async function models() {
  const found = await client.models.list()
  assert.ok(found.data.some((one) => one.id === model))
  assert.equal((await client.models.retrieve(model)).object, 'model')
}

export async function chat() {
  const whole = await client.chat.completions.create(few)
  const text = whole.choices[0].message.content
  assert.match(text, /Paris/)
  assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens)
  const stream = await client.chat.completions.create({ ...few, stream: true, stream_options: { include_usage: true } })
  let pieces = ''
  let last
  for await (const chunk of stream) {
    pieces += chunk.choices[0]?.delta?.content ?? ''
    last = chunk
  }
  assert.equal(pieces, text)
  assert.deepEqual(last.usage.completion_tokens, whole.usage.completion_tokens)
}

export async function helper() {
  const runner = client.chat.completions.stream({ ...few })
  let heard = ''
  runner.on('content', (delta) => (heard += delta))
  assert.equal(await runner.finalContent(), heard)
}

export async function completions() {
  const whole = await client.completions.create({ model, prompt: 'One, two, three, four,', max_tokens: 8, temperature: 0 })
  assert.match(whole.choices[0].text, /five/)
}

export async function abort() {
  const story = [{ role: 'user', content: 'Tell me a very long story about a lighthouse.' }]
  const stream = await client.chat.completions.create({ model, messages: story, stream: true })
  let seen = 0
  for await (const _ of stream) if (++seen === 3) stream.controller.abort()
  assert.equal(seen, 3)
  assert.ok((await client.chat.completions.create({ ...few, max_tokens: 2 })).choices[0])
}

export async function errors() {
  await assert.rejects(client.chat.completions.create({ ...few, model: 'gpt-9' }), OpenAI.NotFoundError)
  await assert.rejects(client.chat.completions.create({ ...few, temperature: -1 }), OpenAI.BadRequestError)
  const long = [{ role: 'user', content: 'word '.repeat(5000) }]
  await assert.rejects(client.chat.completions.create({ ...few, messages: long }), { code: 'context_length_exceeded' })
}
