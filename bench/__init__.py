"""What the kernels are worth: speed, memory and accuracy against plain PyTorch, measured in one run."""
