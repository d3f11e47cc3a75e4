"""The only users of torch.distributed and deepspeed."""
