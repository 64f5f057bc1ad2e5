"""The CPU backend in C++: compiled on first use by any C++ compiler, without PyTorch's headers, called through ctypes.

Each operation is one ``.cpp`` file with a C interface and one module beside it that declares and calls it. All files
are one library (`build`), which is loaded once and must pass the checks of the operations that use it (`loader`).
"""
