// node run.mjs FILE NAME: runs one test; an assertion that fails ends it with its words.
const [file, name] = process.argv.slice(2)
const tests = await import(`./${file}`)
await tests[name]()
