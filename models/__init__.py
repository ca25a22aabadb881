"""Quantized detection models whose forward pass is the integer arithmetic of the engine."""
