// Runs a GGUF file in llama.cpp, as node-llama-cpp packages it, and answers one request.
//
//     node llama_cpp.mjs NODE_MODULES < request.json > answer.json
//
// The request: {model, threads, context, exact, tasks: [...]}. Each task has a `kind`:
//   tokens   {texts}        -> [[id, ...], ...]: the ids of each text; special tokens are recognised in it
//   scores   {ids, all}     -> {next: [...], all?}: the log-probability of each id but the first, after those
//                              in front of it; `all` adds those of the whole vocabulary at every position, as
//                              float32 in base64
//   greedy   {ids, count}   -> [id, ...]: the likeliest continuation
//   speed    {prompt, count, repeats} -> [{prompt_seconds, decode_seconds}, ...]
// `exact` keeps keys and values in float32 and leaves out flash attention.

import {readFileSync} from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const entry = path.join(path.resolve(process.argv[2]), "node-llama-cpp", "dist", "index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(entry).href);
const request = JSON.parse(readFileSync(0, "utf-8"));

const llama = await getLlama({
    gpu: false,
    build: "never",
    maxThreads: request.threads,
    logLevel: LlamaLogLevel.error,
    logger: (level, message) => process.stderr.write(message)
});
const model = await llama.loadModel({modelPath: request.model});
let run = null;

async function sequence() {
    if (run == null) {
        const context = await model.createContext({
            contextSize: request.context,
            batchSize: request.context,
            threads: request.threads,
            flashAttention: false,
            swaFullCache: true,
            ...(request.exact ? {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"} : {})
        });
        run = context.getSequence();
    }
    await run.clearHistory();
    return run;
}

async function scores({ids, all}) {
    await sequence();
    const items = ids.slice(0, all ? ids.length : -1).map((id) => [id, {generateNext: {probabilities: true}}]);
    const next = [];
    const rows = [];
    const results = await run.controlledEvaluate(items);
    results.forEach(({next: {probabilities}}, position) => {
        if (position + 1 < ids.length)
            next.push(Math.log(probabilities.get(ids[position + 1])));
        if (all) {
            const row = new Float32Array(probabilities.size);
            for (const [id, probability] of probabilities)
                row[id] = Math.log(probability);
            rows.push(Buffer.from(row.buffer));
        }
    });
    return {next, ...(all ? {all: Buffer.concat(rows).toString("base64")} : {})};
}

async function greedy({ids, count}) {
    await sequence();
    const made = [];
    for await (const id of run.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
        made.push(id);
        if (made.length >= count)
            break;
    }
    return made;
}

async function speed({prompt, count, repeats}) {
    const found = [];
    for (let turn = 0; turn < repeats; turn++) {
        await sequence();
        const start = performance.now();
        await run.evaluateWithoutGeneratingNewTokens(prompt.slice(0, -1));
        const middle = performance.now();
        let made = 0;
        for await (const id of run.evaluate(prompt.slice(-1), {temperature: 0, yieldEogToken: true}))
            if (++made >= count)
                break;
        found.push({prompt_seconds: (middle - start) / 1000, decode_seconds: (performance.now() - middle) / 1000});
    }
    return found;
}

const kinds = {
    tokens: ({texts}) => texts.map((text) => [...model.tokenize(text, true)]),
    scores,
    greedy,
    speed
};
const answers = [];
for (const task of request.tasks)
    answers.push(await kinds[task.kind](task));
process.stdout.write(JSON.stringify(answers), () => process.exit(0));
