"""ESI's mathematics applied to ZeRO-3 partitions: the only package that imports deepspeed or torch.distributed."""
