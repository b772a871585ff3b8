"""Training of a DPR pair and a BART reader from nothing, on a CPU."""
