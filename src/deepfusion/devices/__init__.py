# SPDX-License-Identifier: Apache-2.0
"""On-device language models: presets, building and loading, what they cost, and the fleet that carries them."""
