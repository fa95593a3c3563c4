"""What others would build for the same: queues of tasks and consumers without a ledger."""
