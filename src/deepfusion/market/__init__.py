# SPDX-License-Identifier: Apache-2.0
"""AERIA: pricing edge inference of multi-exit models (arXiv 2503.04521). A sibling: nothing in the pipeline imports it."""
