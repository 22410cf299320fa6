# SPDX-License-Identifier: Apache-2.0
"""The market as a service over HTTP: signed bids in, slots cleared on the hour, a ledger that anybody can audit."""
