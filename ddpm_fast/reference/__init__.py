"""Every op, and the textbook sampler loops, in plain PyTorch: the oracle of the fast versions, and the fallback.

Needs nothing but torch. Each file is named after its op and has that op's arguments.
"""
