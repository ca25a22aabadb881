"""Weft: from a quantized PyTorch model to an FPGA accelerator, bit for bit."""

__version__ = "0.1.0"
