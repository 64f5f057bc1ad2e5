"""The CPU backend in C++: compiled on first use by any C++ compiler, without PyTorch's headers, called through ctypes.

Each operation is a ``.cpp`` file with a C interface and a module beside it that declares and calls it. Operations of a
family are one library (`build.LIBRARIES`), compiled for this machine when the first of them is called, loaded once, and
used if it passes the checks of the operations in it (`loader`).
"""
