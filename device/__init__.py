"""How a step is executed: processes, precision, CUDA graphs and compiled networks."""
