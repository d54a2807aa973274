"""What the optimizers share: options, state, tables of tensors, clipping, accumulation, saving."""
