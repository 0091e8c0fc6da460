"""One op per file: shape legend, fp32 reference, Triton kernel, public op."""
