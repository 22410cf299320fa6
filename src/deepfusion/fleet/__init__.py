# SPDX-License-Identifier: Apache-2.0
"""A fleet of real machines over Flower: what a device's own file says, what a job is, how all of it is started and watched."""
