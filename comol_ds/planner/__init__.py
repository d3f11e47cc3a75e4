"""What a run will need, from its configuration alone: memory per rank, bytes communicated per step, what would fit.

No weights, no GPU, no other rank. Sizes of weights follow from the shapes that a rank holds; what autograd saves is
counted by running a decoder layer on tensors without memory.
"""
