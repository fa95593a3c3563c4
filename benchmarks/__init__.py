"""What the services cost, each beside its limit in the same run."""
