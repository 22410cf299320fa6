# SPDX-License-Identifier: Apache-2.0
"""The only door between server and devices: the wire format, the ledger, the spool, and the engines behind them."""

import os

# Flower reads these when it is imported: it sends no usage statistics and looks for no update.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
