"""Side-by-side timings against PyTorch and diffusers in one process, with spread and conditions written down."""
