"""Segment-Aligned Policy Optimization (arXiv 2605.01327) for TRL. Not Qwen's *Soft Adaptive* Policy Optimization."""
