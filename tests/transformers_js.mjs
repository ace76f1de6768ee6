// What transformers.js makes of an exported folder: node transformers_js.mjs '{"modules": …, "folder": …, "dtype": …,
// "prompts": […], "new_tokens": …}' prints, for each prompt, its token ids and those that follow greedily.
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

const task = JSON.parse(process.argv[2]);
const entry = join(task.modules, '@huggingface/transformers/dist/transformers.node.mjs');
const { AutoModelForCausalLM, AutoTokenizer, env } = await import(pathToFileURL(entry));
env.allowRemoteModels = false;
const tokenizer = await AutoTokenizer.from_pretrained(task.folder);
const model = await AutoModelForCausalLM.from_pretrained(task.folder, { dtype: task.dtype });
const answers = [];
for (const prompt of task.prompts) {
  const inputs = tokenizer(prompt);
  const ids = inputs.input_ids.tolist()[0].map(Number);
  const all = await model.generate({ ...inputs, max_new_tokens: task.new_tokens, do_sample: false });
  answers.push({ ids, follow: all.tolist()[0].slice(ids.length).map(Number) });
}
console.log(JSON.stringify(answers));
