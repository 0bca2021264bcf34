"""Triton kernels of ddpo_fast, one module an op. Imports torch and triton only."""
