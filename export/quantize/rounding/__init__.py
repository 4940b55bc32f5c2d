"""Weights to blocks of integers, and the graph that multiplies by them."""
