"""Speed and memory beside diffusers and the published recipe."""
