"""What the framework takes before any weight is there: Python and its libraries, CUDA's context. In bytes."""

MIB, GIB = 2**20, 2**30
# Python, torch, transformers and a tokenizer, before the model is there; reported beside --ram.
FRAMEWORK_RAM = 400 * MIB
# CUDA's context and the libraries' workspaces, inside --vram, for the driver counts them as ours.
FRAMEWORK_VRAM = 500 * MIB
