"""From a problem to a running kernel: reasons, choice of kernel and tile, binding, launch."""
