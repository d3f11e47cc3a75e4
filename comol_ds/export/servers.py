"""What each server does with an adapter folder that is not as it should be.

Read in the sources of vLLM 0.32.0 (lora/peft_helper.py, lora/lora_model.py, lora/layers), SGLang 0.5 (srt/lora/lora.py,
mem_pool.py, utils.py; issues 40835, 28199), TGI 3.3.7 (adapters/lora.py, utils/adapter.py, utils/sgmv.py) and llama.cpp
(convert_lora_to_gguf.py, src/llama-adapter.cpp). Tried with PEFT 0.21.2, vLLM's parser and llama.cpp; SGLang and TGI
need a GPU and were read only. A kind of fault is absent from a server that it does not harm.
"""

from dataclasses import dataclass

from comol_ds.errors import one_line

_LONGEST = 1000  # characters of `Fault.what`, which quotes names and values of the files

SERVERS = ("vllm", "sglang", "tgi", "llamacpp", "peft")
_NAMES = {"vllm": "vLLM", "sglang": "SGLang", "tgi": "TGI", "llamacpp": "llama.cpp", "peft": "PEFT"}


@dataclass(frozen=True)
class Fault:
    """Something in an adapter folder that at least one server refuses or misreads.

    Attributes:
        kind: a key of CONSEQUENCES.
        where: the file.
        what: the key or tensor and its value.
        remedy: what to do about it.
    """

    kind: str
    where: str
    what: str
    remedy: str

    def harms(self, server: str) -> bool:
        return server in CONSEQUENCES[self.kind]

    def line(self, server: str, others: int = 0) -> str:
        """One line; `others` counts further faults of the kind in the folder."""
        more = f" (and {others} more like it)" if others else ""
        what = one_line(self.what, _LONGEST)
        return f"{self.where}: {what}{more}; {_NAMES[server]} {CONSEQUENCES[self.kind][server]}; {self.remedy}"


def _every(text: str) -> dict[str, str]:
    return dict.fromkeys(SERVERS, text)


_DROPS = "drops it without a word"
_IGNORES = "ignores it without a word"
_FAILS_LATE = "loads it and fails at the first request"
_STOPS = "stops when it converts it"  # llama.cpp, whose converter is the one that looks at the folder
_DEFAULT_8 = "takes PEFT's default, 8"
_MISMATCH = "refuses it: size mismatch"
_NO_TENSOR_LIKE_IT = "stops at a tensor that is neither lora_A.weight nor lora_B.weight"

_FILES = {
    "no config": _every("finds no adapter in the folder"),
    "config unreadable": _every("cannot read it"),
    "no tensor file": _every("finds no weights"),
    "pickle only": _every("unpickles it, and nothing in it could be checked here")
    | {"tgi": "reads safetensors files only and finds no weights"},
    "pickle beside": _every("reads adapter_model.safetensors and ignores this file without a word"),
    "second tensor file": dict.fromkeys(
        ("sglang", "tgi"), "reads every *.safetensors in the folder, and one overwrites the other's tensors"
    ),
    "tensors unreadable": _every("cannot read it"),
    "no tensors": _every("serves the base model unchanged"),
}

_CONFIG = {
    "no peft_type": dict.fromkeys(("sglang", "peft"), "refuses the adapter: KeyError"),
    "other peft_type": {
        "vllm": "does not read peft_type and takes the tensors for those of a LoRA",
        "sglang": "refuses any other than LORA",
        "tgi": "serves LORA only",
        "llamacpp": "does not read peft_type and takes the tensors for those of a LoRA",
        "peft": "reads it as that method, if it has it, and nothing was checked here",
    },
    "no r": {
        "vllm": "refuses the adapter: a required field",
        "sglang": "refuses the adapter: KeyError",
        "tgi": _DEFAULT_8,
        "peft": _DEFAULT_8,
    },
    "r is no rank": dict.fromkeys(("vllm", "sglang", "tgi", "peft"), "refuses the adapter"),
    "no lora_alpha": {
        "vllm": "refuses the adapter: a required field",
        "sglang": "refuses the adapter: KeyError",
        "tgi": _DEFAULT_8,
        "llamacpp": "stops at a KeyError in its converter",
        "peft": _DEFAULT_8,
    },
    "lora_alpha is no number": _every("cannot compute the scaling and stops")
    | {"llamacpp": "reads a number in quotes and stops at anything else"},
    "lora_alpha is 0": _every("scales the update to nothing")
    | {"llamacpp": "takes 0 for 'not scaled' and adds the update with factor 1"},
    "no target_modules": {
        "vllm": "refuses the adapter: a required field",
        "sglang": "refuses the adapter: KeyError",
        "peft": "guesses the modules from the model's type and leaves out the tensors of all others",
    },
    "target_modules empty": {
        "sglang": "takes it for an adapter of no modules",
        "peft": "refuses it, or guesses the modules from the model's type",
    },
    "target_modules is a pattern": {
        "sglang": "knows no patterns and refuses it, or looks for modules named by its single letters"
    },
    "tensors not targeted": {
        "sglang": "keeps no buffer for the module: it refuses the adapter or drops the tensors",
        "peft": "leaves the tensors out without a word",
    },
    "rsLoRA": dict.fromkeys(("sglang", "llamacpp"), "scales by lora_alpha/r all the same, without a word"),
    "rank_pattern": {
        "sglang": "expects r rows in every lora_A and fails at the first request",
        "tgi": "scales every module by lora_alpha/r, without a word",
    },
    "alpha_pattern": dict.fromkeys(("sglang", "tgi", "llamacpp"), _IGNORES),
    "DoRA": {
        "vllm": "refuses the adapter",
        "sglang": "refuses the adapter",
        "tgi": "drops the magnitudes without a word",
        "llamacpp": _NO_TENSOR_LIKE_IT,
    },
    "bias": {
        "vllm": "refuses the adapter",
        "sglang": "takes a bias for a lora_B or drops it",
        "tgi": "drops the biases without a word",
        "llamacpp": _NO_TENSOR_LIKE_IT,
    },
    "modules_to_save": {
        "vllm": "refuses the adapter",
        "sglang": "drops these modules or stops",
        "tgi": "drops these modules without a word",
        "llamacpp": _NO_TENSOR_LIKE_IT,
    },
    "initialization changes the base": {
        "vllm": "refuses the adapter",
        "sglang": "adds the update to a base that was not changed, without a word",
        "tgi": "adds the update to a base that was not changed, without a word",
        "llamacpp": "adds the update to a base that was not changed, without a word",
    },
    "layer_replication": {"vllm": "refuses the adapter", "sglang": _IGNORES, "tgi": _IGNORES, "llamacpp": _IGNORES},
    "alora": {"vllm": "refuses the adapter", "sglang": _IGNORES, "tgi": _IGNORES},
    "rank too high": {"vllm": "serves ranks up to 512, the greatest --max-lora-rank"},
    "rank padded": {
        # sgmv.pad_rank, and `config.r = padded_rank` in LoraWeights.prepare_weights; 8 is for one GPU, W GPUs need 8 W
        "tgi": "pads the rank to 8 or a multiple of 16 and, from the second kind of module on, divides lora_alpha by"
        " the padded rank, without a word"
    },
}

_NAMES_OF_TENSORS = {
    "adapter's name": {
        "vllm": "refuses the adapter: unsupported LoRA weight",
        "tgi": _DROPS,
        "llamacpp": _NO_TENSOR_LIKE_IT,
        "peft": "finds it only if the adapter is loaded under that very name, otherwise serves the base",
    },
    "no prefix": {"tgi": _DROPS, "peft": "does not find it and serves the base, with no more than a warning"},
    "fused q, k, v": {
        "vllm": "knows the parts only and refuses the adapter",
        "llamacpp": "converts it and refuses it when it loads it: no such tensor",
        "peft": "finds no such module and refuses or drops it",
    },
    "fused gate, up": {
        "vllm": "knows the parts only and refuses the adapter",
        "tgi": _DROPS,
        "llamacpp": "converts it and refuses it when it loads it: incorrect shape",
        "peft": "finds no such module and refuses or drops it",
    },
    "unknown module": {
        "vllm": "refuses the adapter unless the last part of the name fits another module",
        "sglang": "drops it or stops",
        "tgi": _DROPS,
        "llamacpp": "cannot map the name and stops when it converts it",
        "peft": _DROPS,
    },
    "module not served": {"tgi": "applies adapters to the attention's and the MLP's projections only and drops it"},
    "extra tensor": {
        "vllm": "refuses the adapter: unsupported LoRA weight",
        "sglang": "takes it for a lora_B if its name has a module's, or drops it",
        "tgi": _DROPS,
        "llamacpp": _NO_TENSOR_LIKE_IT,
        "peft": _DROPS,
    },
    "tensor given twice": _every("takes one of the two, or refuses the adapter"),
    "siblings missing": {"sglang": "fuses these modules and, depending on its version, stops without the missing one"},
    "layer missing": {"tgi": "drops this kind of module in every layer, without a word"},
    "tied vocabulary": {"llamacpp": "refuses a LoRA at a tied lm_head and aborts with one at a tied embedding"},
    "vocabulary too large": {"vllm": "refuses a LoRA at lm_head beyond 258048 tokens"},
    "architecture": {"llamacpp": "maps names by architecture, and none is known to fit here"},
}

_VALUES_OF_TENSORS = {
    "no lora_A": {
        "vllm": "loads it; at the first request a fused module loses its update, any other stops the engine",
        "sglang": "stops, or adds nothing in this module",
        "tgi": "drops this kind of module in every layer, without a word",
        "llamacpp": _STOPS,
        "peft": "draws a random lora_A, with no more than a warning",
    },
    "no lora_B": {
        "vllm": "loads it; at the first request a fused module loses its update, any other stops the engine",
        "sglang": "stops, or adds nothing in this module",
        "tgi": "drops this kind of module in every layer, without a word",
        "llamacpp": _STOPS,
        "peft": "starts lora_B at zero, with no more than a warning",
    },
    "lora_A transposed": {
        "vllm": _FAILS_LATE,
        "sglang": _FAILS_LATE,
        "tgi": "fails when it stacks the layers or serves nonsense",
        "llamacpp": _STOPS,
        "peft": _MISMATCH,
    },
    "lora_B transposed": {
        "vllm": "loads it and fails at the first request, or serves the part that fits",
        "sglang": _FAILS_LATE,
        "tgi": "fails when it stacks the layers or serves nonsense",
        "llamacpp": _STOPS,
        "peft": _MISMATCH,
    },
    "size of the base": {
        "vllm": "loads it and fails at the first request, or serves the part that fits",
        "sglang": _FAILS_LATE,
        "tgi": "fails when it stacks the layers or serves nonsense",
        "llamacpp": "refuses it: incorrect shape",
        "peft": _MISMATCH,
    },
    "no matrix": {
        "vllm": _FAILS_LATE,
        "sglang": _FAILS_LATE,
        "tgi": "stops while it loads it",
        "llamacpp": _STOPS,
        "peft": _MISMATCH,
    },
    "not gathered": {
        "vllm": _FAILS_LATE,
        "sglang": _FAILS_LATE,
        "tgi": "stops while it loads it",
        "llamacpp": _STOPS,
        "peft": _MISMATCH,
    },
    "no rank": {
        "vllm": "loads it and adds nothing, without a word",
        "sglang": _FAILS_LATE,
        "tgi": "pads it with zeros and adds nothing, without a word",
        "llamacpp": _STOPS,
        "peft": _MISMATCH,
    },
    "ranks of a pair": {
        "vllm": "leaves out what only one of them has, without a word",
        "sglang": _FAILS_LATE,
        "tgi": "fails when it stacks the layers or at the first request",
        "llamacpp": _STOPS,
        "peft": _MISMATCH,
    },
    "r differs": {
        "vllm": "scales by lora_alpha/r, without a word",
        "sglang": _FAILS_LATE,
        "tgi": "scales by lora_alpha/r, without a word",
        "llamacpp": "scales by lora_alpha over the tensors' rank, without a word",
        "peft": _MISMATCH,
    },
    "mixed ranks": {
        "vllm": "scales it by lora_alpha/r, without a word",
        "sglang": _FAILS_LATE,
        "tgi": "fails when it stacks the layers, or scales by lora_alpha/r",
        "llamacpp": "scales it by lora_alpha over its own rank, without a word",
        "peft": _MISMATCH,
    },
    "NaN": _every("loads it without a word and answers with NaN"),
    "infinite": _every("loads it without a word and answers with NaN"),
    "quantized": _every("takes the codes for numbers, without their scales and without a word"),
}

_FORMS = {
    "CoMoL form": {
        "vllm": "refuses the adapter: unsupported LoRA weight",
        "sglang": "refuses any other than LORA",
        "tgi": "serves LORA only",
        "llamacpp": _NO_TENSOR_LIKE_IT,
    },
    "CoMoL adapter": {"peft": "with comol_ds imported refuses it"},
    "gated form": {
        "sglang": "refuses any other than LORA",
        "tgi": "serves LORA only",
        "llamacpp": _NO_TENSOR_LIKE_IT,
        "peft": "refuses the adapter: it has no such method",
    },
    "gated form called LORA": {
        "sglang": "leaves out the routing and adds all experts up, without a word",
        "tgi": "leaves out the routing and adds all experts up, without a word",
        "llamacpp": _NO_TENSOR_LIKE_IT,
        "peft": "leaves out the routing and adds all experts up, with no more than a warning",
    },
    "gated form unguarded": {"vllm": "without the plugin serves it as a plain LoRA, without a word"},
    "gated rank": {"vllm": "with the plugin reads the wrong rows as experts"},
}

CONSEQUENCES: dict[str, dict[str, str]] = _FILES | _CONFIG | _NAMES_OF_TENSORS | _VALUES_OF_TENSORS | _FORMS
