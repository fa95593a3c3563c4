"""Reads order-created in group mail-service and sends each order's confirmation mail."""
