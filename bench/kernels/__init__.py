"""Every kernel over the shapes of real models, beside other libraries: `python -m bench.kernels`.

__main__.py    the command line, and the loop over cases and providers
cases.py       operations: sizes, bytes and FLOPs, inputs, references
selection.py   models, which cases are measured where, and what they should reach
ours.py        our launchers on a case's tensors
providers.py   the other libraries on them
machine.py     memory, clocks and peaks of the CPU (NumPy) and of a GPU (PyTorch)
report.py      CSV, tables, what became slower
plots.py       roofline and bars
"""
