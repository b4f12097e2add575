"""Device code only: no allocation, no environment, no choice of kernel or tile."""
