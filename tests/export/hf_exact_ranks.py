"""One rank of an hf-exact checkpoint that transformers splits over all ranks. Started by torchrun: FOLDER IDS LOGITS.

IDS is torch.save of input ids. Rank 0 writes LOGITS: torch.save of logits and the shapes that it holds of layer 1.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig


def main(folder: str, ids_path: str, logits_path: str) -> None:
    dist.init_process_group("gloo")
    plan = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, distributed_config=plan).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.load(ids_path)).logits
    if dist.get_rank() == 0:
        layer = dict(model.model.layers[1].named_parameters())
        local = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in layer.items()}
        torch.save((logits, {name: tuple(value.shape) for name, value in local.items()}), logits_path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
