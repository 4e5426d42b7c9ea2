"""Packed matrices on an NVIDIA GPU."""
