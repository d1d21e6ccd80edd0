"""In vLLM's environment: the greedy tokens of each model and their log probabilities, or why there are none.

Reads the tokens of the prompt, the number of tokens and the jobs from stdin, as JSON. `FIRST` in the environment names
a module that is imported before vLLM; `REMOTE_CODE=0` keeps vLLM from running the code of a checkpoint.
"""

import gc
import importlib
import json
import os
import sys


def main() -> None:
    if first := os.environ.get("FIRST"):
        importlib.import_module(first)
    from vllm import LLM, SamplingParams

    prompt, length, jobs = json.load(sys.stdin)
    sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False, logprobs=1)
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "skip_tokenizer_init": True}
    options["trust_remote_code"] = os.environ.get("REMOTE_CODE") != "0"
    for path, processes in jobs:
        try:
            model = LLM(path, tensor_parallel_size=processes, **options)
            out = model.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].outputs[0]
            logprobs = [step[token].logprob for step, token in zip(out.logprobs, out.token_ids, strict=True)]
            found = {"tokens": list(out.token_ids), "logprobs": logprobs}
            del model
            gc.collect()
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print("RESULT", json.dumps(found), flush=True)


if __name__ == "__main__":  # the processes that vLLM starts import this file
    main()
