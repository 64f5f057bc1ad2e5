"""The operations as Triton kernels, for CUDA and ROCm; under ``TRITON_INTERPRET=1`` on CPU tensors, for tests.

Importing this package needs neither Triton nor a GPU; importing one of its operations needs Triton.
"""
