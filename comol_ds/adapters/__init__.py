"""The adapters' mathematics: plain PyTorch in one process, no ranks, no DeepSpeed, no statistics sink."""
