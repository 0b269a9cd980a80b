"""`python -m caps_kernels.inspect`: what compilers make of the GPU kernels, without a GPU."""
