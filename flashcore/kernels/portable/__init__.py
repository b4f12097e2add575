"""Plain Triton kernels: sm_80, sm_89, sm_90, and Triton's interpreter on CPU tensors."""
