"""Networks, data and training loops that several studies share."""
