# SPDX-License-Identifier: Apache-2.0
"""Records as people read them: a table in the terminal, a page in the browser, events for TensorBoard."""
