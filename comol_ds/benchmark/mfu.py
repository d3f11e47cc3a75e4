"""Model FLOPs utilization (MFU) of training adapters beside frozen weights: what is counted, and against which peak.

MFU is the rate of the FLOPs that a step needs by its equations / the device's peak (PaLM, arXiv 2204.02311, appendix
B). What activation checkpointing computes a second time is not counted. With all layers recomputed a device multiplies
6 N per token where 4 N count, so MFU stays below 2/3 of what the device's products reach of the peak.
"""

from transformers import LlamaConfig

# Dense bf16 TFLOP/s of NVIDIA's data sheets by torch's name of the device. For Hopper the sheets state the rate with
# sparsity, twice the dense one (1,979 for H100 SXM and H200, 1,671 for NVL cards, 1,513 for H100 PCIe).
# https://www.nvidia.com/en-us/data-center/a100/  .../h100/  .../h200/
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.0,
    "NVIDIA H200 NVL": 835.0,
}


def flops_per_token(config: LlamaConfig, tokens: int) -> int:
    """FLOPs of a training step per token of a row: 4 N + 12 L H T, H = attention heads * head size.

    N is the entries of the frozen matrices, head included; the embedding is looked up and norms are vectors. Forward
    takes 2 N, and the gradient of the activations 2 N; frozen weights have no gradient, which would be another 2 N. The
    two products of attention have no weights: 4 L H T forward and twice that backward, as in PaLM's appendix B, where
    causality halves nothing. The adapter's own products, about 6 per trained parameter, are not counted: at r=16, E=8
    they are 0.3 % of Llama-3.1-70B's, and without them the MFU of two methods have the ratio of their times.

    Args:
        config: a Llama's.
        tokens: T, of a row.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    layer = 2 * hidden * heads + 2 * hidden * key_value + 3 * hidden * config.intermediate_size
    frozen = config.num_hidden_layers * layer + hidden * config.vocab_size
    return 4 * frozen + 12 * config.num_hidden_layers * heads * tokens


def peak_flops(device: str, tflops: float | None = None) -> float | None:
    """FLOP/s of a device in dense bf16: what is given, else its data sheet's; None for a device that is not known."""
    found = PEAK_TFLOPS.get(device) if tflops is None else tflops
    return None if found is None else found * 1e12
