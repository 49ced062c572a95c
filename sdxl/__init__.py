"""SDXL by hand: networks, loading, LoRA, and what sampling and training share of it."""
