// What llama.cpp makes of a GGUF file: node llama_cpp.mjs '{"modules": …, "model": …, "prompts": […], "new_tokens": …}'
// prints, for each prompt, its token ids, the text of these, and the ids that follow greedily.
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const task = JSON.parse(process.argv[2]);
const entry = join(task.modules, "node-llama-cpp", "dist", "index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(entry));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: 1});
const model = await llama.loadModel({modelPath: task.model});
const context = await model.createContext({
    contextSize: task.context, flashAttention: false, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"
});
const sequence = context.getSequence();
const answers = [];
for (const prompt of task.prompts) {
    await sequence.clearHistory();
    const ids = model.tokenize(prompt, true), follow = [];
    if (task.new_tokens)
        for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true}))
            if (follow.push(token) >= task.new_tokens || model.isEogToken(token)) break;
    answers.push({ids, follow, text: model.detokenize(ids, true)});
}
console.log(JSON.stringify({answers, sampling: model.fileInfo.metadata.general.sampling}));
process.exit(0);
