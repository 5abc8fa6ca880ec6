"""Pipelines of SNP and TDX guests without their hardware: the kernel's folder is FIFOs, with a process behind them."""
