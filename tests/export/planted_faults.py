"""One planted fault per row, with the line that one server's user reads."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from tests.export.adapter_folders import (
    LAYER_0,
    NAMES,
    O1,
    Q0,
    RANK,
    adapt_head,
    both,
    config_edit,
    drop,
    fuse,
    other_base,
    pickle_only,
    put,
    rename,
    resize,
    tensor_edit,
    truncate,
    with_value,
)


class Row(NamedTuple):
    """A fault and the line that `server` has for it, with C and T for the two files and F for the folder."""

    kind: str
    plant: Callable[[Path], None]
    server: str
    line: str


GATED = {"version": 1, "r": 4, "num_experts": 2, "router": "core"}
guard = put("comol_guard.needs_the_plugin", lambda _: torch.zeros(1))
without = "train without it or serve a merged model"
targets = "list the endings of the adapted modules' names"
again = "export or copy the adapter again"

ROWS = [
    Row("no config", lambda folder: (folder / "adapter_config.json").unlink(), "vllm",
        "{F}: adapter_config.json is missing; vLLM finds no adapter in the folder; give an adapter folder"),
    Row("config unreadable", lambda folder: (folder / "adapter_config.json").write_text("{") and None, "sglang",
        "{C}: is no JSON, Expecting property name enclosed in double quotes: line 1 column 2 (char 1); SGLang cannot"
        f" read it; {again}"),
    Row("no tensor file", lambda folder: (folder / "adapter_model.safetensors").unlink(), "peft",
        f"{{F}}: adapter_model.safetensors is missing; PEFT finds no weights; {again}"),
    Row("pickle only", pickle_only, "tgi",
        "{F}/adapter_model.bin: is a pickle, which can run code, and there is no adapter_model.safetensors; TGI reads"
        " safetensors files only and finds no weights; load it with torch.load(weights_only=True) and write it with"
        " safetensors"),
    Row("pickle beside", lambda folder: torch.save({}, folder / "adapter_model.bin"), "llamacpp",
        "{F}/adapter_model.bin: lies beside adapter_model.safetensors and may hold other values; llama.cpp reads"
        " adapter_model.safetensors and ignores this file without a word; delete it"),
    Row("second tensor file", lambda folder: save_file({"x": torch.zeros(1)}, folder / "old.safetensors"), "tgi",
        "{F}/old.safetensors: lies beside adapter_model.safetensors; TGI reads every *.safetensors in the folder, and"
        " one overwrites the other's tensors; move it to another folder"),
    Row("tensors unreadable", truncate, "vllm",
        "{T}: is damaged, cannot be read as safetensors, copy or download it again: tensor 'base_model.model."
        "model.layers.1.self_attn.v_proj.lora_B.weight' lies at bytes 32632 to 33144 of a file of 33044; vLLM cannot"
        f" read it; {again}"),
    Row("no tensors", tensor_edit(lambda _: {}), "peft",
        "{T}: holds no tensors; PEFT serves the base model unchanged; export the adapter again"),
    Row("no peft_type", config_edit("peft_type"), "sglang",
        '{C}: peft_type is missing; SGLang refuses the adapter: KeyError; write "peft_type": "LORA"'),
    Row("other peft_type", config_edit(peft_type="LOHA"), "vllm",
        "{C}: peft_type is 'LOHA'; vLLM does not read peft_type and takes the tensors for those of a LoRA; give a LORA"
        " or COMOL adapter"),
    Row("no r", config_edit("r"), "tgi",
        "{C}: r is missing; TGI takes PEFT's default, 8; write the number of rows of lora_A"),
    Row("r is no rank", config_edit(r="8"), "vllm",
        "{C}: r is '8'; vLLM refuses the adapter; write the number of rows of lora_A, a whole number"),
    Row("no lora_alpha", config_edit("lora_alpha"), "llamacpp",
        "{C}: lora_alpha is missing; llama.cpp stops at a KeyError in its converter; write it; lora_alpha = r scales"
        " by 1"),
    Row("lora_alpha is no number", config_edit(lora_alpha="16"), "peft",
        "{C}: lora_alpha is '16'; PEFT cannot compute the scaling and stops; write a number; r scales by 1"),
    Row("lora_alpha is 0", config_edit(lora_alpha=0), "llamacpp",
        "{C}: lora_alpha is 0; llama.cpp takes 0 for 'not scaled' and adds the update with factor 1; write a positive"
        " number; r scales by 1"),
    Row("no target_modules", config_edit("target_modules"), "vllm",
        f"{{C}}: target_modules is missing; vLLM refuses the adapter: a required field; {targets}"),
    Row("target_modules empty", config_edit(target_modules=None), "peft",
        "{C}: target_modules is None; PEFT refuses it, or guesses the modules from the model's type; " + targets),
    Row("target_modules is a pattern", config_edit(target_modules=".*_proj"), "sglang",
        "{C}: target_modules is the pattern '.*_proj'; SGLang knows no patterns and refuses it, or looks for modules"
        f" named by its single letters; {targets}"),
    Row("tensors not targeted", config_edit(target_modules=[name for name in NAMES if name != "o_proj"]), "peft",
        "{T}: model.layers.0.self_attn.o_proj has tensors, target_modules do not reach it (and 1 more like it); PEFT"
        " leaves the tensors out without a word; add o_proj to them or remove the tensors"),
    Row("rsLoRA", config_edit(use_rslora=True, lora_alpha=16), "sglang",
        "{C}: use_rslora is true, a scaling of 5.65685 where lora_alpha/r is 2; SGLang scales by lora_alpha/r all the"
        " same, without a word; multiply lora_B by the scaling, set lora_alpha = r and use_rslora false"),
    Row("rank_pattern", both(config_edit(rank_pattern={"o_proj": 4}),
                             tensor_edit(lambda tensors: {
                                 key: tensor if "o_proj" not in key else tensor[:4] if "lora_A" in key
                                 else tensor[:, :4] for key, tensor in tensors.items()})), "sglang",
        "{C}: rank_pattern sets o_proj 4; SGLang expects r rows in every lora_A and fails at the first request; pad all"
        " modules to one rank, multiply lora_B by its scaling and remove the patterns"),
    Row("alpha_pattern", config_edit(alpha_pattern={"q_proj": 32}), "llamacpp",
        "{C}: alpha_pattern sets q_proj 32; llama.cpp ignores it without a word; pad all modules to one rank, multiply"
        " lora_B by its scaling and remove the patterns"),
    Row("DoRA", config_edit(use_dora=True), "tgi",
        f"{{C}}: use_dora is true; TGI drops the magnitudes without a word; {without}"),
    Row("bias", config_edit(bias="all"), "vllm", f"{{C}}: bias is 'all'; vLLM refuses the adapter; {without}"),
    Row("modules_to_save", config_edit(modules_to_save=["lm_head"]), "llamacpp",
        "{C}: modules_to_save is ['lm_head']; llama.cpp stops at a tensor that is neither lora_A.weight nor"
        f" lora_B.weight; {without}"),
    Row("initialization changes the base", config_edit(init_lora_weights="pissa_niter_16"), "vllm",
        "{C}: init_lora_weights is 'pissa_niter_16', for which PEFT changes the base when it loads the adapter; vLLM"
        " refuses the adapter; convert it with PEFT's path_initial_model_for_weight_conversion"),
    Row("layer_replication", config_edit(layer_replication=[[0, 2], [1, 2]]), "sglang",
        f"{{C}}: layer_replication is [[0, 2], [1, 2]]; SGLang ignores it without a word; {without}"),
    Row("alora", config_edit(alora_invocation_tokens=[1, 2]), "tgi",
        f"{{C}}: alora_invocation_tokens make it an activated LoRA; TGI ignores it without a word; {without}"),
    Row("rank too high", both(config_edit(r=1024, lora_alpha=1024), resize(RANK, 1024)), "vllm",
        "{C}: the rank is 1024; vLLM serves ranks up to 512, the greatest --max-lora-rank; train with a lower r or"
        " serve a merged model"),
    Row("rank padded", both(config_edit(r=24, lora_alpha=24), resize(RANK, 24)), "tgi",
        "{C}: r is 24; TGI pads the rank to 8 or a multiple of 16 and, from the second kind of module on, divides"
        " lora_alpha by the padded rank, without a word; pad lora_A and lora_B with zeros to rank 32, with"
        " lora_alpha = r = 32"),
    Row("adapter's name", rename(".weight", ".policy.weight"), "vllm",
        f"{{T}}: {LAYER_0}.mlp.down_proj.lora_A.policy.weight has an adapter's name in it (and 27 more like it); vLLM"
        f" refuses the adapter: unsupported LoRA weight; rename it to {LAYER_0}.mlp.down_proj.lora_A.weight"),
    Row("no prefix", rename("base_model.model.", ""), "peft",
        "{T}: model.layers.0.mlp.down_proj.lora_A.weight lacks PEFT's prefix (and 27 more like it); PEFT does not find"
        " it and serves the base, with no more than a warning; rename it to"
        " base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"),
    Row("fused q, k, v", fuse(["q_proj", "k_proj", "v_proj"], "qkv_proj"), "vllm",
        "{T}: model.layers.0.self_attn.qkv_proj is a fused module (and 1 more like it); vLLM knows the parts only and"
        " refuses the adapter; split lora_B's rows into q_proj, k_proj, v_proj, each with a copy of lora_A"),
    Row("fused gate, up", fuse(["gate_proj", "up_proj"], "gate_up_proj"), "tgi",
        "{T}: model.layers.0.mlp.gate_up_proj is a fused module (and 1 more like it); TGI drops it without a word;"
        " split lora_B's rows into gate_proj, up_proj, each with a copy of lora_A"),
    Row("unknown module", both(rename("o_proj", "fc9"), config_edit(target_modules=[*NAMES, "fc9"])), "llamacpp",
        "{T}: model.layers.0.self_attn.fc9 is no Linear or Embedding of the base model (and 1 more like it); llama.cpp"
        " cannot map the name and stops when it converts it; check the base model, or remove its tensors"),
    Row("module not served", adapt_head(), "tgi",
        "{T}: lm_head is adapted; TGI applies adapters to the attention's and the MLP's projections only and drops it;"
        f" {without}"),
    Row("extra tensor", put(f"{Q0}.comol_core", lambda _: torch.zeros(2, 4, 4)), "vllm",
        f"{{T}}: {Q0}.comol_core is neither lora_A nor lora_B; vLLM refuses the adapter: unsupported LoRA weight;"
        " remove it"),
    Row("tensor given twice", put(f"{Q0}.lora_A.policy.weight", lambda _: torch.zeros(RANK, 32)), "sglang",
        f"{{T}}: {Q0}.lora_A.weight is the second of its kind for its module; SGLang takes one of the two, or refuses"
        " the adapter; keep one adapter's tensors in a folder"),
    Row("siblings missing", both(drop("k_proj"), config_edit(target_modules=[n for n in NAMES if n != "k_proj"])),
        "sglang",
        "{T}: model.layers.0.self_attn.k_proj has no tensors, q_proj or v_proj has; SGLang fuses these modules and,"
        " depending on its version, stops without the missing one; add a zero-filled pair for k_proj in every layer"),
    Row("layer missing", drop("layers.1.mlp.down_proj"), "tgi",
        "{T}: model.layers.*.mlp.down_proj has no tensors in layer 1 of 2; TGI drops this kind of module in every"
        " layer, without a word; add zero-filled pairs there"),
    Row("tied vocabulary", adapt_head(tie_word_embeddings=True), "llamacpp",
        "{T}: lm_head is adapted, and embedding and lm_head share one weight; llama.cpp refuses a LoRA at a tied"
        f" lm_head and aborts with one at a tied embedding; {without}"),
    Row("vocabulary too large", adapt_head(vocabulary=258049), "vllm",
        f"{{T}}: lm_head has 258049 tokens; vLLM refuses a LoRA at lm_head beyond 258048 tokens; {without}"),
    Row("architecture", other_base(architectures=["MyForCausalLM"]), "llamacpp",
        "{C}: the base model's architecture is MyForCausalLM; llama.cpp maps names by architecture, and none is known"
        " to fit here; try convert_lora_to_gguf.py --dry-run"),
    Row("no lora_A", drop(f"{O1}.lora_A"), "peft",
        "{T}: model.layers.1.self_attn.o_proj has lora_B only; PEFT draws a random lora_A, with no more than a warning;"
        " export the adapter again"),
    Row("no lora_B", drop(f"{Q0}.lora_B"), "vllm",
        "{T}: model.layers.0.self_attn.q_proj has lora_A only; vLLM loads it; at the first request a fused module loses"
        " its update, any other stops the engine; export the adapter again"),
    Row("lora_A transposed", put(f"{Q0}.lora_A.weight", lambda tensor: tensor.T), "vllm",
        f"{{T}}: {Q0}.lora_A.weight has shape [32, 8], not [r, in_features]; vLLM loads it and fails at the first"
        " request; transpose it"),
    Row("lora_B transposed", put(f"{Q0}.lora_B.weight", lambda tensor: tensor.T), "llamacpp",
        f"{{T}}: {Q0}.lora_B.weight has shape [8, 32], not [out_features, r]; llama.cpp stops when it converts it;"
        " transpose it"),
    Row("size of the base", put(f"{Q0}.lora_A.weight", lambda tensor: tensor[:, :31]), "peft",
        f"{{T}}: {Q0}.lora_A.weight has shape [8, 31], the base model's I is 32 there; PEFT refuses it: size mismatch;"
        " name the base model it was trained on"),
    Row("no matrix", put(f"{Q0}.lora_A.weight", lambda tensor: tensor[None]), "tgi",
        f"{{T}}: {Q0}.lora_A.weight has shape [1, 8, 32]; TGI stops while it loads it; write a matrix"),
    Row("not gathered", put(f"{Q0}.lora_A.weight", lambda _: torch.zeros(0)), "vllm",
        f"{{T}}: {Q0}.lora_A.weight is empty, shape [0]; vLLM loads it and fails at the first request; gather ZeRO-3"
        " partitions before saving"),
    Row("no rank", put(f"{Q0}.lora_A.weight", lambda _: torch.zeros(0, 32)), "vllm",
        f"{{T}}: {Q0}.lora_A.weight has shape [0, 32]; vLLM loads it and adds nothing, without a word; export with a"
        " rank of at least 1"),
    Row("ranks of a pair", put(f"{Q0}.lora_A.weight", lambda tensor: tensor[:4]), "vllm",
        "{T}: model.layers.0.self_attn.q_proj has a lora_A of 4 rows and a lora_B of 8 columns; vLLM leaves out what"
        " only one of them has, without a word; export the adapter again"),
    Row("r differs", config_edit(r=16), "llamacpp",
        "{C}: r is 16, the tensors have rank 8; llama.cpp scales by lora_alpha over the tensors' rank, without a word;"
        " write the tensors' rank"),
    Row("mixed ranks", both(put(f"{Q0}.lora_A.weight", lambda tensor: tensor[:4]),
                            put(f"{Q0}.lora_B.weight", lambda tensor: tensor[:, :4])), "sglang",
        f"{{T}}: {Q0}.lora_A.weight has rank 4 where the configuration says 8; SGLang loads it and fails at the first"
        " request; pad all modules with zeros to one rank"),
    Row("NaN", put(f"{Q0}.lora_B.weight", with_value(float("nan"))), "peft",
        f"{{T}}: {Q0}.lora_B.weight holds NaN; PEFT loads it without a word and answers with NaN; export an earlier"
        " checkpoint"),
    Row("infinite", put(f"{Q0}.lora_B.weight", with_value(float("-inf"))), "vllm",
        f"{{T}}: {Q0}.lora_B.weight holds infinite values; vLLM loads it without a word and answers with NaN; export in"
        " a wider dtype or an earlier checkpoint"),
    Row("quantized", put(f"{Q0}.lora_A.weight", lambda tensor: (100 * tensor).to(torch.int8)), "sglang",
        f"{{T}}: {Q0}.lora_A.weight has dtype I8; SGLang takes the codes for numbers, without their scales and without"
        " a word; write it in float32, float16 or bfloat16"),
    Row("CoMoL form", config_edit(peft_type="COMOL"), "vllm",
        "{C}: peft_type is COMOL, a token-dependent adapter; vLLM refuses the adapter: unsupported LoRA weight; export"
        " it with --format lora, or for vLLM with --format vllm-lora"),
    Row("CoMoL adapter", config_edit("r", peft_type="COMOL", num_experts=2, peft_version="0.21.2"), "peft",
        "{F}: adapter_model.safetensors: the adapter has no comol_ tensors; PEFT with comol_ds imported refuses it;"
        " export it again with --format comol"),
    Row("gated form", both(config_edit(peft_type="COMOL_VLLM", comol=GATED), guard), "sglang",
        "{C}: comol makes it a CoMoL adapter for vLLM; SGLang refuses any other than LORA; serve it with vLLM and the"
        " plugin of comol_ds, or export it with --format lora"),
    Row("gated form called LORA", both(config_edit(comol=GATED), guard), "tgi",
        "{C}: comol makes it a CoMoL adapter for vLLM; TGI leaves out the routing and adds all experts up, without a"
        " word; serve it with vLLM and the plugin of comol_ds, or export it with --format lora"),
    Row("gated form unguarded", config_edit(peft_type="COMOL_VLLM", comol=GATED), "vllm",
        "{T}: has no comol_guard tensor; vLLM without the plugin serves it as a plain LoRA, without a word; export it"
        " again with --format vllm-lora"),
    Row("gated rank", both(config_edit(peft_type="COMOL_VLLM", comol=GATED | {"r": 8}), guard), "vllm",
        "{C}: r is 8, comol has r=8 and num_experts=2, whose product it must be; vLLM with the plugin reads the wrong"
        " rows as experts; export it again with --format vllm-lora"),
]  # fmt: skip
