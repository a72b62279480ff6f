"""Exact statistics of attention from fused calls alone: features in the value slot, no matrix of queries x keys."""
