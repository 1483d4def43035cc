"""y = x · Wᵀ on packed W: the torch reference, native CPU kernels, bitsandbytes for nf4."""
