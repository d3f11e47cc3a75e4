"""One vLLM start, several steps. Run by vllm_offline.py with the vLLM environment's python: JOB RESULTS.

JOB is JSON: {"engine": arguments of vllm.LLM, "vocabulary": V, "steps": [...]}, with steps
    {"do": "score", "new_tokens": n, "requests": [{"token_ids": [...], "adapter": {"id", "path"} or null}, ...]}
    {"do": "load", "adapter": {"id", "path"}}       {"do": "unload", "adapter": {"id", "path"}}
RESULTS is torch.save of one entry per step: a list of (token_ids, logprobs [T - 1, V]) for score, the error or None for
load and unload. T counts the prompt and the new tokens.
"""

import json
import sys

import torch


def main(job_path: str, results_path: str) -> None:
    from vllm import LLM

    with open(job_path) as file:
        job = json.load(file)
    llm = LLM(**job["engine"])
    actions = {"score": score, "load": load, "unload": unload}
    torch.save([actions[step["do"]](llm, step, job["vocabulary"]) for step in job["steps"]], results_path)


def score(llm, step: dict, vocabulary: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=max(step["new_tokens"], 1),  # vLLM samples at least one
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=vocabulary,
        logprobs=vocabulary,
    )
    outputs = llm.generate(
        [{"prompt_token_ids": request["token_ids"]} for request in step["requests"]],
        sampling,
        lora_request=[request["adapter"] and lora_request(request["adapter"]) for request in step["requests"]],
        use_tqdm=False,
    )
    scored = []
    for output in outputs:
        new = output.outputs[0]
        rows = [*output.prompt_logprobs[1:], *new.logprobs[: step["new_tokens"]]]
        token_ids = [*output.prompt_token_ids, *new.token_ids[: step["new_tokens"]]]
        table = torch.tensor([[row[token].logprob for token in range(vocabulary)] for row in rows])
        scored.append((torch.tensor(token_ids), table))
    return scored


def load(llm, step: dict, vocabulary: int) -> str | None:
    try:
        llm.llm_engine.add_lora(lora_request(step["adapter"]))
    except Exception as error:  # whatever vLLM says is the result
        return f"{type(error).__name__}: {error}"
    return None


def unload(llm, step: dict, vocabulary: int) -> str | None:
    return None if llm.llm_engine.remove_lora(step["adapter"]["id"]) else "was not loaded"


def lora_request(adapter: dict):
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"adapter-{adapter['id']}", adapter["id"], adapter["path"])


if __name__ == "__main__":
    main(*sys.argv[1:])
