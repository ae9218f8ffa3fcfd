"""What the commands are made of: the flags of `sample`, samples of a run and of a published checkpoint, image files
that say what made them, and the config of `finetune`. The commands themselves are modules of `diffusion_jax`.
"""
