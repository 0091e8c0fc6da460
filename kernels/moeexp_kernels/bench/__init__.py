"""`python -m moeexp_kernels.bench`: how long each op takes at the full model's shapes, beside its peers. README: Kernels."""
