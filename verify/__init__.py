"""Proves every kernel of scattermoe_lora right, and that no change makes one slower."""
