"""Gluon kernels for sm_90: TMA loads and stores, wgmma."""
