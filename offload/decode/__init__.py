"""One fast decode step: on the CPU as one native call, on a GPU as one CUDA graph."""
