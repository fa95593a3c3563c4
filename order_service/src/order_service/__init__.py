"""Takes orders over REST; persists each with its event; relays the events to Kafka."""
