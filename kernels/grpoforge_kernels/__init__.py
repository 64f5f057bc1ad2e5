"""A small closed vocabulary of tensor operations; imports torch only, never grpoforge.

The engine calls operations from `grpoforge_kernels.ops`. Each has a plain PyTorch definition in
`grpoforge_kernels.reference`, which is the oracle that every other backend must equal, and may have a C++ backend in
`grpoforge_kernels.cpp` and a Triton backend in `grpoforge_kernels.triton`; `grpoforge_kernels.dispatch` chooses.
"""
