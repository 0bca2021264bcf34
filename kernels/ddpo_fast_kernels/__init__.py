"""Triton kernels of ddpo_fast, one module for each op. Imports torch and triton only."""
