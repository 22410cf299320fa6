# SPDX-License-Identifier: Apache-2.0
"""Exits on any causal LM: heads, split execution, early exit with key/value state propagation, and the table of it all.

Shapes: L blocks, M exits after blocks x_1 < .. < x_M = L, B sequences, T positions, H hidden width, V vocabulary, R rows
(positions taken out of a batch).
"""
