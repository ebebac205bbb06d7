"""The layer inside transformers, PEFT, bitsandbytes and torch.distributed, one module each."""
